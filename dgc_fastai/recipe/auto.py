"""Settings that a recipe leaves to the number of its pictures: `data.batch_size: auto` and `train.epochs: auto`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..utils.errors import RecipeError
from .schema import Data

__all__ = ["choose_settings"]

KEYS = (("data", "batch_size"), ("train", "epochs"))
STEPS = 1_000  # that a network trained from scratch needs at least; measured from 100 to 2,000 pictures
MIN_EPOCHS = 20
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # that torchvision reads
UNKNOWN = 2_000  # pictures, where they cannot be counted


def choose_settings(content: dict[str, Any], lines: Mapping[tuple, str], where: str) -> str | None:
    """Replace every `auto` of a recipe by a number; say which numbers they are and why.

    Args:
        content: the recipe's sections, changed in place.
        lines: for each key where it is, for errors.
        where: the source of the recipe.

    Returns:
        A sentence such as "318 training pictures: data.batch_size=32, train.epochs=101"; None if nothing was left to
        choose, or if the folder cannot be read, which `check_machine` reports.

    Raises:
        RecipeError: the data are no folder of pictures.
    """
    asked = [(section, key) for section, key in KEYS if _section(content, section).get(key) == "auto"]
    if not asked:
        return None
    data = _section(content, "data")
    if data.get("name") != "folder":
        name = ".".join(asked[0])
        place = lines.get(asked[0], where)
        subject = place if place.startswith(f"{name}=") else f"{place}: {name}"
        raise RecipeError(f"{subject}: auto is for data.name=folder; use a number")
    count = count_training_pictures(data)
    pictures = count or UNKNOWN
    if ("data", "batch_size") in asked:
        data["batch_size"] = batch_size_for(pictures)
    if ("train", "epochs") in asked:
        batch_size = data.get("batch_size", 64)
        is_number = isinstance(batch_size, int) and batch_size > 0  # anything else is refused afterwards
        content["train"]["epochs"] = epochs_for(pictures, batch_size if is_number else 64)
    if not count:
        return None
    settings = ", ".join(f"{section}.{key}={content[section][key]}" for section, key in asked)
    return f"{count:,} training pictures: {settings}"


def batch_size_for(pictures: int) -> int:
    """At least some ten steps an epoch, and 64 pictures where there are enough of them."""
    return 16 if pictures < 200 else 32 if pictures < 2_000 else 64


def epochs_for(pictures: int, batch_size: int) -> int:
    """`STEPS` steps, but at least `MIN_EPOCHS` epochs, and at most 200."""
    per_epoch = max(1, -(-pictures // batch_size))
    return min(200, max(MIN_EPOCHS, -(-STEPS // per_epoch)))


def count_training_pictures(data: Mapping[str, Any]) -> int | None:
    """Pictures to train on, by their names; None if the folder cannot be read."""
    from .machine import folder_parts

    try:
        section = Data.model_validate({**data, "batch_size": 1})
        train, valid = folder_parts(section)
        count = sum(
            name.lower().endswith(IMAGE_ENDINGS)
            for folder in _class_folders(train)
            for _, _, names in os.walk(folder, followlinks=True)
            for name in names
        )
        return count if valid else round(count * (1 - section.held_out))
    except (OSError, ValidationError):
        return None


def _class_folders(folder: Path) -> list[str]:
    return [entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}
