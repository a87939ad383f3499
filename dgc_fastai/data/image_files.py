"""Image files: read and augmented one by one, in worker processes if there are any."""

import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import _loaders, chunked
from fastai.data.transforms import Categorize, IntToFloatTensor, Normalize, ToTensor, parent_label
from fastai.torch_basics import ItemTransform, TensorCategory, TensorImage, Transform, to_device
from fastai.vision.core import PILImage
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..recipe.machine import folder_parts
from ..recipe.schema import Data
from ..utils.errors import RecipeError, UserError
from ..utils.text import one_line
from .augmentation import RandomErasing, evaluation_transform, training_transform
from .epoch_loader import EpochDL
from .prefetch import prefetch
from .resizing import ResizeCrops, flatten_crops

__all__ = ["FileDL", "ImageReader", "UnreadableImage", "file_loaders", "open_image"]

MOST_OBLONG = 200  # times as long as wide
RESIZING_DEVICES = ("cuda",)  # they resize the crops of a batch; elsewhere the workers do


class UnreadableImage(UserError):
    """A file that is not an image, or is damaged. Args: its path and the reason."""


def open_image(path: Path) -> PILImage:
    """An image file in RGB, decoded by Pillow.

    torchvision's decoders are at most a tenth faster, are deprecated, and its PNG decoder aborts the process at a
    damaged file (version 0.29).

    Raises:
        UnreadableImage: the file is not an image, is damaged, or exceeds Pillow's limit of pixels, or is a line.
    """
    try:
        image = PILImage.create(path, mode=None)
        if max(image.size) > MOST_OBLONG * min(image.size):  # resized by its shorter side, it would fill the memory
            raise ValueError(f"it is {image.width:,} x {image.height:,} pixels, which is no picture")
        if image.mode.startswith("I;16"):  # Pillow's conversion would clip 16 bits to white
            image = PILImage.create((np.asarray(image) >> 8).astype(np.uint8))
        return image if image.mode == "RGB" else PILImage(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders have no common error
        reason = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise UnreadableImage(path, one_line(reason)) from None


class ImageReader:
    """Reads image files one by one, as the validation images of `data`: path -> uint8 [channels, size, size].

    Raises:
        UnreadableImage: when called, if the file cannot be read.
    """

    def __init__(self, data: Data):
        channels, *size = data.input_size
        gray = v2.Grayscale() if channels == 1 else v2.Identity()
        resized = v2.Compose([gray, v2.PILToTensor(), v2.Resize(size, antialias=True)])
        self.transform = evaluation_transform(data) if data.is_image_files else resized
        self.to_float = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*data.statistics)])

    def __call__(self, path: Path) -> Tensor:
        return self.transform(open_image(path))

    def normalize(self, images: Tensor) -> Tensor:
        """What the network takes of images [..., channels, size, size], on their device."""
        return self.to_float(images)


class ImageTransform(Transform):
    """A torchvision transform of a PIL image to uint8 [3, H, W], for training (split 0) or validation (split 1)."""

    def __init__(self, function: v2.Transform, split_idx: int):
        super().__init__()
        self.function, self.split_idx = function, split_idx

    def encodes(self, image: PILImage):
        return TensorImage(self.function(image))


class FileDL(EpochDL):
    """Reads image files. Each is augmented by random numbers of its own, so the number of workers changes nothing.

    A batch comes without the images that cannot be read, and with their paths: see `Unreadable`.
    """

    def __iter__(self):
        """fastai's loop. Batches are prepared in advance: copied, and what transforms with `is_prefetched` do."""
        self.randomize()
        self.before_iter()
        self._DataLoader__idxs = self.get_idxs()  # where fastai's `sample` looks, also in a worker
        transforms, split_idx = list(self.after_batch.fs), self.after_batch.split_idx
        early = list(takewhile(lambda transform: getattr(transform, "is_prefetched", False), transforms))

        def apply(some, batch):
            for transform in some:
                batch = transform(batch, split_idx=split_idx)
            return batch

        def prepare(batch):
            batch = tuple(batch) if isinstance(batch, list) else batch  # pinning makes lists of tuples
            return apply(early, to_device(batch, self.device, non_blocking=True))

        # Nothing here names the iterator: a traceback would keep its worker processes alive.
        for batch in prefetch(_loaders[self.fake_l.num_workers == 0](self.fake_l), prepare, self.device):
            yield apply(transforms[len(early) :], batch)
        self.after_iter()

    def do_item(self, index: int | None):
        if index is None:  # fastai asks for any item, to learn the types
            return next(item for item in map(self._try_item, range(self.n)) if item is not None)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(self.item_seed + index)
        try:
            return super().do_item(index)
        finally:
            torch.set_rng_state(state)

    def _try_item(self, index: int):
        try:
            return self.do_item(index)
        except UnreadableImage:
            return None

    def create_batches(self, samples):
        for indices in chunked(samples, self.bs, self.drop_last):
            items, unreadable = [], []
            for index in indices:
                try:
                    items.append(self.do_item(index))
                except UnreadableImage as error:
                    unreadable.append(error.args)
            yield self.do_batch(items, unreadable)

    def do_batch(self, items: Sequence[tuple[Tensor, Tensor]], unreadable: Sequence[tuple[Path, str]] = ()):
        return (*(self.collate(items) if items else (None, None)), unreadable)

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]):
        return super().do_batch(items)


class CropsDL(FileDL):
    """A FileDL whose workers crop and leave the resizing to the device: see `ResizeCrops`.

    Resizing is most of a worker's work after decoding. Workers still crop, because a crop is fewer bytes to transfer
    than its image.
    """

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]):
        crops, labels = zip(*items)
        return tuple(flatten_crops(crops)), TensorCategory(torch.stack(labels))


class Unreadable(ItemTransform):
    """Removes the list of unreadable images from a batch, and warns of each once, or stops the run.

    This happens in the main process, because an error in a worker arrives with a traceback.
    """

    order, is_prefetched = -100, True

    def __init__(self, skip: bool):
        self.skip = skip
        self.known: set[str] = set()

    def encodes(self, batch):
        *batch, unreadable = batch
        for path, reason in unreadable:
            if not self.skip or batch[0] is None:
                raise RecipeError(
                    f"data.path: cannot read the image {path}: {reason}; mend or remove it"
                    + ("" if self.skip else ", or set data.unreadable=skip")
                )
            if path not in self.known:
                self.known.add(path)
                logging.getLogger(__name__).warning("skipped the unreadable image %s: %s", path, reason)
        return batch


def file_loaders(data: Data, device: torch.device, classes: Sequence[str]) -> DataLoaders:
    """DataLoaders of ImageNet or a folder of pictures; see `build_dataloaders`.

    Raises:
        RecipeError: a class has no images, or no share of each class can be held out for validation.
    """
    train, valid = _image_files(data)
    numbers = range(len(train)), range(len(train), len(train) + len(valid))
    categorize = Categorize(vocab=list(classes), sort=False)
    categorize.setups(None)
    datasets = Datasets(
        train + valid,
        tfms=[[open_image], [parent_label, categorize]],
        splits=[list(split) for split in numbers],
        do_setup=False,  # it would open the first image, which may be unreadable
    )
    on_device = device.type in RESIZING_DEVICES
    transforms = [
        ImageTransform(training_transform(data, may_leave_large=on_device), 0),
        ImageTransform(evaluation_transform(data), 1),
    ]
    erasing = [RandomErasing()] if "random_erasing" in data.augment else []
    unreadable = Unreadable(skip=data.unreadable == "skip")
    loaders = [
        (CropsDL if resize else FileDL)(
            datasets.subset(split_idx),
            bs=data.batch_size,
            shuffle=split_idx == 0,
            num_workers=data.workers,
            drop_last=False,  # the authors keep the last, smaller batch
            after_item=[*transforms, ToTensor()],
            after_batch=[unreadable, *resize, IntToFloatTensor(), _normalize(data), *erasing],
            pin_memory=device.type == "cuda",
            device=device,
        )
        # The workers resize validation images: each is needed whole, and only once an epoch.
        for split_idx, resize in enumerate(([ResizeCrops(data.image_size)] * on_device, []))
    ]
    return DataLoaders(*loaders, device=device)


def _normalize(data: Data) -> Normalize:
    return Normalize.from_stats(*data.statistics, cuda=False)


def _image_files(data: Data) -> tuple[list[Path], list[Path]]:
    """Training and validation files. Where there is no validation folder, a share of each class is held out."""
    train, valid = folder_parts(data)
    if valid:
        return _files_below(train), _files_below(valid)
    files = _files_below(train)
    try:
        # The same split whatever the seed of the training.
        labels = [path.parent.name for path in files]
        return train_test_split(files, test_size=data.held_out, random_state=0, stratify=labels)
    except ValueError as error:
        reason = str(error).split(".")[0]
        raise RecipeError(f"data.valid_share: cannot hold out {data.held_out} of {train}: {reason}") from None


def _files_below(folder: Path) -> list[Path]:
    try:
        return [Path(path) for path, _ in ImageFolder(folder).samples]
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"data.path: {folder}: {str(error).splitlines()[0]}") from None
