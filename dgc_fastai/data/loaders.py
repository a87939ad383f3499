"""The data section of a recipe -> fastai DataLoaders."""

from collections.abc import Sequence

import fastai.vision.learner  # noqa: F401  (registers the layouts of show_batch and show_results for images)
import torch
from fastai.data.core import DataLoaders
from torch import Tensor

from ..recipe.schema import Data
from .classes import class_names
from .image_files import file_loaders
from .in_memory import tensor_loaders

__all__ = ["build_dataloaders", "training_images"]


def build_dataloaders(data: Data, device: torch.device, classes: Sequence[str] | None = None) -> DataLoaders:
    """Training and validation DataLoaders of a recipe's data, on a device.

    Batches are normalized images [B, channels, size, size] and class numbers [B].

    Args:
        classes: `class_names(data)`, if they have been read already.

    Raises:
        RecipeError: files are missing, damaged, or of another format than their names say.
    """
    return (file_loaders if data.is_image_files else tensor_loaders)(data, device, classes or class_names(data))


def training_images(data: Data, device: torch.device, classes: Sequence[str], most: int) -> Tensor:
    """Training images as validation would see them: without augmentation, spread evenly over the whole set.

    Args:
        classes: `class_names(data)`.
        most: the number of images, if there are so many.

    Returns:
        Normalized images [N, channels, size, size], on the device.

    Raises:
        RecipeError: as `build_dataloaders`; or an image cannot be read.
    """
    loaders = build_dataloaders(data.model_copy(update={"workers": 0}), device, classes)
    images, loader = loaders.train_ds, loaders.valid
    count = min(most, len(images))
    loader.dataset, loader.n = images, len(images)
    loader.get_idxs = lambda: [place * len(images) // count for place in range(count)]
    with images.set_split_idx(1):  # the transforms of validation
        return torch.cat([batch[0].as_subclass(Tensor) for batch in loader])
