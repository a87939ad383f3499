"""Small sets: held as one tensor on the device, indexed and augmented there a batch at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.data.transforms import Category, IntToFloatTensor, Normalize
from fastai.torch_basics import TensorCategory, TensorImage, TensorImageBW
from torch import Tensor

from ..recipe.schema import Data
from ..utils.errors import RecipeError
from .augmentation import batch_augmentation
from .epoch_loader import EpochDL
from .small_sets import small_set

__all__ = ["TensorDL", "TensorImages", "tensor_loaders"]

MAX_BYTES = 4 * 2**30  # of all images after resizing


class TensorImages:
    """A dataset of uint8 images [N, C, H, W] and labels [N], indexed by one number or by a list of them."""

    n_inp = 1  # otherwise fastai augments an image to find out, which draws random numbers

    def __init__(self, images: Tensor, labels: Tensor, vocab: Sequence[str], split_idx: int):
        self.images, self.labels, self.vocab, self.split_idx = images, labels, vocab, split_idx

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        index = torch.as_tensor(index, device=self.labels.device)
        kind = TensorImageBW if self.images.shape[1] == 1 else TensorImage
        return kind(self.images[index]), TensorCategory(self.labels[index])

    def decode(self, item, full: bool = True):
        image, label = item
        return image, Category(self.vocab[int(label)])

    @contextmanager
    def set_split_idx(self, split_idx: int) -> Iterator["TensorImages"]:
        """Within this context, loaders transform the images as those of another part, as in fastai's `Datasets`."""
        before, self.split_idx = self.split_idx, split_idx
        try:
            yield self
        finally:
            self.split_idx = before

    def new_empty(self) -> "TensorImages":
        return TensorImages(self.images[:0], self.labels[:0], self.vocab, self.split_idx)


class TensorDL(EpochDL):
    """Takes a whole batch from the tensors by one indexing operation."""

    def create_batches(self, samples):
        # The indices of all batches go to the device at once: each copy would wait for it.
        indices = torch.tensor(list(samples), dtype=torch.long, device=self.dataset.labels.device)
        yield from (self.dataset[part] for part in indices.split(self.bs) if len(part))


def tensor_loaders(data: Data, device: torch.device, classes: Sequence[str]) -> DataLoaders:
    """DataLoaders of digits, Fashion-MNIST or CIFAR, resized to `data.size`; see `build_dataloaders`.

    Raises:
        RecipeError: files are missing or damaged, or the resized images need more than `MAX_BYTES`.
    """
    splits = small_set(data)
    size = data.image_size
    needed = sum(len(images) for images, _ in splits) * splits[0][0].shape[1] * size**2
    if needed > MAX_BYTES:
        raise RecipeError(
            f"data.size: {data.name} at {size} px needs {needed / 2**30:.0f} GiB, and it is held in memory; "
            "use a smaller size"
        )
    loaders = [
        TensorDL(
            TensorImages(_resize(images, size).to(device), labels.to(device), classes, split_idx),
            bs=data.batch_size,
            shuffle=split_idx == 0,
            num_workers=0,
            after_batch=[
                *batch_augmentation(data),
                IntToFloatTensor(),
                _normalize(data),
            ],
            device=device,
        )
        for split_idx, (images, labels) in enumerate(splits)
    ]
    return DataLoaders(*loaders, device=device)


def _normalize(data: Data) -> Normalize:
    return Normalize.from_stats(*data.statistics, cuda=False)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    parts = (
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        for part in images.split(256)  # as floats, the whole set would need four times its memory
    )
    return torch.cat(list(parts))
