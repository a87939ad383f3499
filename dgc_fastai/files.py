"""Writing a file so that a reader finds the old one or the new one, never half of either."""

import os
import tempfile
from pathlib import Path
from typing import Union

__all__ = ["write_atomically"]


def write_atomically(path: Union[str, Path], content: Union[str, bytes]) -> None:
    """Replace the file at `path`, or create it, in one step that a crash cannot split.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is then as it was.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    # In the same folder: a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
