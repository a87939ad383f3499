"""Which image files are meant: files, folders, patterns and lists, and the part of them for one of several processes.

Imports no torch: what is wrong with a command line is to be said at once.
"""

import glob
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..recipe.auto import IMAGE_ENDINGS
from ..utils.errors import UserError

__all__ = ["Shard", "find_images", "list_on_stdin"]


@dataclass(frozen=True)
class Shard:
    """One of several parts of a list, from 1. An image's part depends on its name alone, so lists may grow."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "I/N".

        Raises:
            UserError: it is not that.
        """
        first, _, second = text.partition("/")
        if first.isascii() and first.isdigit() and second.isascii() and second.isdigit():
            if 1 <= int(first) <= int(second):
                return cls(int(first), int(second))
        raise UserError(f"--shard {text}: use I/N, such as 1/8 for the first of eight; I is from 1 to N")

    def has(self, path: Path) -> bool:
        return zlib.crc32(os.fsencode(path)) % self.count == self.number - 1


def find_images(sources: Iterable[Path]) -> list[Path]:
    """The image files that are meant, each once.

    Args:
        sources: image files; folders, for all files below with an image's ending, hidden ones left out; and patterns
            such as `photos/**/*.jpg`.

    Raises:
        UserError: a file is missing, a folder cannot be read or has no images, or no file has the pattern.
    """
    found: dict[Path, None] = {}
    for source in sources:
        found |= dict.fromkeys(_files_of(source))
    return list(found)


def _files_of(source: Path) -> list[Path]:
    if source.is_dir():
        if not (files := list(_below(source))):
            raise UserError(f"{source}: there are no images in this folder ({', '.join(IMAGE_ENDINGS)})")
        return files
    if source.exists():
        return [source]
    if not glob.has_magic(str(source)):
        raise UserError(f"{source}: cannot read the image: No such file or directory")
    files = [Path(path) for path in sorted(glob.glob(str(source), recursive=True)) if not os.path.isdir(path)]
    if not files:
        raise UserError(f"{source}: no file has a name like this")
    return files


def _below(folder: Path) -> Iterator[Path]:
    """The images below a folder. Links are followed, but not to a folder that they are in."""
    above = {str(folder): {_identity(str(folder))}}  # of each folder to come: itself, and those that it is in
    for place, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        here, kept = above.pop(place), []
        for name in sorted(name for name in folders if name[0] != "."):
            path = os.path.join(place, name)
            if (identity := _identity(path)) not in here:
                above[path] = here | {identity}
                kept.append(name)
        folders[:] = kept
        yield from (Path(place, name) for name in sorted(names) if _is_image(name))


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        _unreadable(error)
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot read the folder: {error.strerror}") from None


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(IMAGE_ENDINGS)


def list_on_stdin() -> list[Path]:
    """The files that are named on standard input, one a line.

    Raises:
        UserError: there are none, or standard input is closed.
    """
    if sys.stdin is None:
        raise UserError("-: cannot read the list of images: standard input is closed")
    lines = sys.stdin.buffer.read().splitlines()
    if not (files := list(dict.fromkeys(Path(os.fsdecode(line)) for line in lines if line.strip()))):
        raise UserError("-: the list of images on standard input is empty")
    return files
