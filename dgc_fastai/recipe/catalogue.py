"""The recipes that lie in a folder: what each is for, and copies to edit."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import yaml

from ..utils.errors import RecipeError
from ..utils.files import write_atomically
from .loading import load_recipe

__all__ = ["copy_recipe", "describe_recipes"]


def describe_recipes(folder: Path) -> Sequence[tuple[Path, str, str]]:
    """Path, title and what it reproduces, of each recipe in a folder, from their headers.

    Raises:
        RecipeError: there are none.
    """
    found = []
    for path in sorted(folder.glob("*.yaml")):
        header = "".join(line[1:] for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        title, _, rest = header.partition("\n")
        # A field begins at a word in the first column; its other lines are indented.
        fields = dict(re.findall(r"^ (\w+) {2,}(.*(?:\n {3,}.*)*)", rest, re.M))
        found.append((path, title.strip(), " ".join(fields.get("Reproduces", "nothing it tells of.").split())))
    if not found:
        raise RecipeError(f"{folder}: there are no recipes (*.yaml)")
    return found


def copy_recipe(source: Path, target: Optional[Path]) -> Path:
    """Write a recipe under another name, comments and all, and return where it is.

    Args:
        target: by default `my_` and the old name, in the working folder.

    Raises:
        RecipeError: the source is no recipe, or something is in the way.
        WriteError: the copy cannot be written.
    """
    old = load_recipe(source).name
    target = target or Path(f"my_{source.name}")
    if target.suffix != ".yaml":
        raise RecipeError(f"{target}: give the copy a name that ends in .yaml")
    if os.path.lexists(target):  # a link to nowhere is somebody's, too
        raise RecipeError(f"{target}: there is a file of that name already; name another: copy {source} NAME.yaml")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", target.stem).lstrip("_.-") or "recipe"
    text = source.read_text()
    # Its commands are to run the copy, and its runs to have its name.
    text = text.replace(f"recipes/{source.name}", str(target))
    text = re.sub(
        rf"^name:\s*['\"]?{re.escape(old)}['\"]?", f"name: {yaml.safe_dump(name).split(chr(10))[0]}", text, flags=re.M
    )
    write_atomically(target, text)
    return target
