"""Copies of recipes to edit."""

import os
import re
from pathlib import Path

import yaml

from ..utils.errors import RecipeError
from ..utils.files import write_atomically
from ..utils.invocation import program
from .catalogue import find_recipe
from .loading import load_recipe

__all__ = ["copy_recipe"]


def copy_recipe(recipe: str | Path, target: Path | None) -> Path:
    """Write a recipe under another name, with its comments, and return the path.

    Args:
        recipe: a path, or the name of a recipe that comes with the package.
        target: by default `my_` and the old file name, in the working folder.

    Raises:
        RecipeError: the source is not a recipe, or the target exists.
        WriteError: the copy cannot be written.
    """
    old, source = load_recipe(recipe).name, find_recipe(recipe)
    target = target or Path(f"my_{source.name}")
    if target.suffix != ".yaml":
        raise RecipeError(f"{target}: give the copy a name that ends in .yaml")
    if os.path.lexists(target):  # a broken symbolic link counts, too
        raise RecipeError(
            f"{target}: there is a file of that name already; give another name: {program()} copy {recipe} NAME.yaml"
        )
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", target.stem).lstrip("_.-") or "recipe"
    # The commands in the header are to run the copy, and its runs are to have its name.
    text = source.read_text(encoding="utf-8")
    text = text.replace(f"recipes/{source.name}", str(target)).replace("python app.py ", f"{program()} ")
    text = re.sub(
        rf"^name:\s*['\"]?{re.escape(old)}['\"]?", f"name: {yaml.safe_dump(name).split(chr(10))[0]}", text, flags=re.M
    )
    write_atomically(target, text)
    return target
