"""The class names of a recipe's data."""

from ..recipe.machine import folder_parts, image_classes
from ..recipe.schema import Data
from .small_sets import small_set_classes

__all__ = ["class_names"]


def class_names(data: Data) -> list[str]:
    """The classes in the order of their numbers, from the files of the data.

    Raises:
        RecipeError: the files are missing or damaged.
    """
    return image_classes(folder_parts(data)[0]) if data.is_image_files else small_set_classes(data)
