"""The data section of a recipe -> fastai DataLoaders."""

from collections.abc import Sequence

import fastai.vision.learner  # noqa: F401  (registers the layouts of show_batch and show_results for images)
import torch
from fastai.data.core import DataLoaders

from ..recipe.schema import Data
from .classes import class_names
from .image_files import file_loaders
from .in_memory import tensor_loaders

__all__ = ["build_dataloaders"]


def build_dataloaders(data: Data, device: torch.device, classes: Sequence[str] | None = None) -> DataLoaders:
    """Training and validation DataLoaders of a recipe's data, on a device.

    Batches are normalized images [B, channels, size, size] and class numbers [B].

    Args:
        classes: `class_names(data)`, if they have been read already.

    Raises:
        RecipeError: files are missing, damaged, or of another format than their names say.
    """
    return (file_loaders if data.is_image_files else tensor_loaders)(data, device, classes or class_names(data))
