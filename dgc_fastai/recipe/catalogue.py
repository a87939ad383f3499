"""The recipes that come with the package: found by name, and described from their headers."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..utils.errors import RecipeError
from .yaml_text import parse_yaml

__all__ = ["Description", "describe_recipes", "find_recipe", "recipe_names", "recipes_folder"]


@dataclass(frozen=True)
class Description:
    """A recipe in a list. Fields that its header does not have are empty."""

    path: Path
    title: str
    data: str
    gpu: str
    """Whether it needs a GPU: `no`, `advised` or `yes`."""
    time: str
    target: str
    """The published accuracy of this experiment, or `none`."""


def recipes_folder() -> Path:
    """The folder of the recipes: inside an installed package, or at the top of a clone."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe, given as a path or as the name of one that comes with the package.

    A file in the working folder takes precedence. The path is returned unchanged if there is no such file.
    """
    path = Path(recipe)
    if path.is_file() or path.name != str(recipe):
        return path
    named = recipes_folder() / f"{path.name.removesuffix('.yaml')}.yaml"
    return named if named.is_file() else path


def describe_recipes(folder: Path) -> list[Description]:
    """Describe each recipe in a folder: quickstart first, then those that need no GPU.

    Raises:
        RecipeError: the folder has no recipes.
    """
    found = [_describe(path) for path in folder.glob("*.yaml")]
    if not found:
        raise RecipeError(f"{folder}: there are no recipes (*.yaml) in this folder")
    gpu = ["no", "advised", "yes"]
    return sorted(
        found,
        key=lambda one: (one.path.stem != "quickstart", gpu.index(one.gpu) if one.gpu in gpu else 3, one.path.stem),
    )


def _describe(path: Path) -> Description:
    try:
        text = path.read_text(encoding="utf-8")
        content, _ = parse_yaml(text, str(path))
        data = str(content["data"]["name"])
    except (OSError, UnicodeDecodeError, RecipeError, KeyError, TypeError):
        return Description(path, "", "not a recipe", "", "", "")
    header = "".join(line[1:] for line in text.splitlines(keepends=True) if line.startswith("#"))
    title, _, rest = header.partition("\n")
    # A field begins with a word in the first column. Its other lines are indented.
    fields = dict(re.findall(r"^ (\w+) {2,}(.*(?:\n {3,}.*)*)", rest, re.M))
    # A list has room for the first sentence of each.
    gpu, time, target = (" ".join(fields.get(name, "").split()).split(". ")[0] for name in ("GPU", "Time", "Target"))
    target = target.replace(" (published)", "").replace(" published", "")
    return Description(path, title.strip(), data, gpu, time, target)
