"""Files that several processes may come by: written so that a reader never finds half of one, and locked."""

import csv
import errno
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Union

from .errors import WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["only_one", "remove_partial", "write_atomically", "write_table"]


def write_atomically(path: Union[str, Path], content: Union[str, bytes]) -> None:
    """Replace the file at `path`, or create it, in one step that a crash cannot split.

    A link at `path` is itself replaced; what it points to stays as it is.

    Raises:
        WriteError: the folder is missing or not writable, or the disk is full; `path` is then as it was.
    """
    try:
        _write(Path(path), content.encode() if isinstance(content, str) else content)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "see that it can be written there"
        raise WriteError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None


def _write(path: Path, data: bytes) -> None:
    # In the same folder: a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600; a run is for others to read, too
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)  # an interrupt can come just after the rename
        raise


def write_table(path: Union[str, Path], rows: Sequence[Mapping]) -> None:
    """Write rows, of which there is at least one, as a CSV file, atomically; the first row's keys are the columns."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, table.getvalue())


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed while they wrote to a folder have left there."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold a file for this process; the system lets go of it when the process ends, however it ends.

    Where there are no such locks, as on Windows, nothing is held.

    Raises:
        BlockingIOError: another process holds it.
    """
    with open(path, "rb") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
