"""Files shared between processes: atomic writes and locks."""

import csv
import errno
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["file_lock", "lock_without_children", "remove_partial", "write_atomically", "write_table"]


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Create or replace the file at `path` atomically: readers and crashes see the old content or the new.

    A symbolic link at `path` is replaced itself; its target stays unchanged.

    Raises:
        WriteError: the folder is missing or not writable, or the disk is full. `path` is then unchanged.
    """
    try:
        _write(Path(path), content.encode() if isinstance(content, str) else content)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check that it is there and writable"
        raise WriteError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None


def _write(path: Path, data: bytes) -> None:
    # In the same folder, because a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600; others may read a run
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)  # an interrupt may arrive right after the rename
        raise


def write_table(path: str | Path, rows: Sequence[Mapping]) -> None:
    """Write at least one row as a CSV file, atomically. The keys of the first row are the columns."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, table.getvalue())


def remove_partial(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while writing to a folder."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on an existing file. The system releases it when the process ends, however it ends.

    Without `fcntl`, as on Windows, nothing is locked.

    Raises:
        BlockingIOError: another process holds it.
    """
    with open(path, "rb") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def lock_without_children(file: IO) -> None:
    """Lock a file that is open for writing, until it is closed or this process ends.

    Unlike `file_lock`, processes that this one has started do not hold it: they may outlive it by seconds. Nor does it
    keep this process from opening the file again.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # what some systems raise instead
            raise BlockingIOError(*error.args) from None
