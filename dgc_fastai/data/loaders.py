"""A recipe's data section -> fastai DataLoaders.

Small sets are held as one tensor on the device, and cut and augmented there a batch at a time; the others are read
file by file.
"""

import logging
import math
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import fastai.vision.learner  # noqa: F401  (teaches show_batch and show_results to lay out images)
import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import chunked
from fastai.data.transforms import Categorize, Category, IntToFloatTensor, Normalize, ToTensor, parent_label
from fastai.torch_basics import ItemTransform, TensorCategory, TensorImage, TensorImageBW, Transform, to_detach
from fastai.vision.core import PILImage
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..recipe.machine import folder_parts, image_classes
from ..recipe.schema import Data
from ..utils.errors import RecipeError, UserError
from .augmentation import RandomErasing, batch_augmentation, evaluation_transform, training_transform
from .small_sets import small_set, small_set_classes

__all__ = ["build_dataloaders", "class_names", "input_size", "open_image", "read_image", "statistics"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Per-channel mean and standard deviation, those of CIFAR and ImageNet to the digits that the authors used.
STATISTICS = {
    "digits": ((0.3054,), (0.3760,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": IMAGENET,
    "folder": IMAGENET,
}
FILES = "imagenet", "folder"
RESIZING = ("cuda",)  # devices that resize what the workers have cropped
MOST_BYTES = 4 * 2**30  # of a small set, resized


def build_dataloaders(data: Data, device: torch.device) -> DataLoaders:
    """Training and validation DataLoaders of a recipe's data, on a device.

    Batches are normalised images [B, channels, size, size] and class numbers [B].

    Raises:
        RecipeError: files are missing or not what their names promise.
    """
    return (_file_loaders if data.name in FILES else _tensor_loaders)(data, device)


def statistics(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for values in [0, 1]."""
    return STATISTICS[data.name]


def input_size(data: Data) -> tuple[int, int, int]:
    """Channels, height and width of what the network sees."""
    return len(statistics(data)[0]), data.image_size, data.image_size


def class_names(data: Data) -> list[str]:
    """The classes in the order of their numbers."""
    return image_classes(folder_parts(data)[0]) if data.name in FILES else small_set_classes(data)


class EpochDL(TfmdDL):
    """A TfmdDL that can be put at any batch of any epoch, and then goes on as if it had come there by itself.

    One of several processes takes its part of every batch, so that all of them together make the same batches.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skip, self.item_seed, self.indices = 0, 0, []
        self.rank, self.ranks = 0, 1
        # Starting an iterator draws a seed for its workers; not from the random numbers of the training.
        self.fake_l.generator = torch.Generator()

    def set_epoch(self, seed: int, epoch: int, skip: int = 0) -> None:
        """Let the next iteration be that of an epoch of a run, from the batch after the first `skip`."""
        self.rng, self.skip = random.Random(f"{seed} {epoch}"), skip

    def wif(self):
        # In a worker. A terminal or a scheduler signals the whole group, and the main process is to save first.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def randomize(self):
        super().randomize()
        self.item_seed = self.rng.getrandbits(48)

    def share(self, rank: int, ranks: int) -> None:
        """Take one process's part of every batch from now on; `share(0, 1)` takes all of it."""
        self.bs = self.bs * self.ranks // ranks  # what fastai and its workers count in
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return math.ceil(self.n / (self.bs * self.ranks))

    def get_idxs(self):
        skip, self.skip = self.skip, 0
        indices = super().get_idxs()
        if self.ranks > 1:
            indices = [index for number in range(len(self)) for index in self._part(indices, number)]
        self.indices = indices
        return indices[skip * self.bs :]

    def _part(self, indices: list[int], number: int) -> list[int]:
        batch = indices[number * self.bs * self.ranks :][: self.bs * self.ranks]
        start, end = self._bounds(len(batch))
        # In training, a process without an image takes one all the same, with no weight: the others wait for it.
        return batch[start:end] or batch[: self.shuffle]

    def _bounds(self, size: int) -> tuple[int, int]:
        """Where this process's part of so many images begins and ends."""
        return size * self.rank // self.ranks, size * (self.rank + 1) // self.ranks

    def size(self, number: int) -> int:
        """How many images a batch has, in all processes."""
        whole = self.bs * self.ranks
        return min(self.n - number * whole, whole)

    def weight(self, number: int) -> float:
        """What the mean of this process's part of a training batch weighs in the mean over all processes' parts."""
        size = self.size(number)
        start, end = self._bounds(size)
        return (end - start) * self.ranks / size

    def batch_names(self, number: int) -> list[str]:
        """What the images of a batch of this epoch are called: files by their paths, others by their place."""
        items = getattr(self.dataset, "items", None)
        indices = self.indices[number * self.bs :][: self.bs]
        return [str(index if items is None else items[index]) for index in indices]

    def to_detach(self, b, cpu: bool = True, gather: bool = True):
        return to_detach(b, cpu, gather=False)  # metrics are added up over processes once, and not padded


# Small sets -----------------------------------------------------------------------------------------------


class TensorImages:
    """Images [N, C, H, W] in bytes and labels [N], indexed by one number or by a list of them."""

    n_inp = 1  # else fastai augments an image to find out, in the first step after a start or a resumption

    def __init__(self, images: Tensor, labels: Tensor, vocab: list[str], split_idx: int):
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

    def new_empty(self) -> "TensorImages":
        return TensorImages(self.images[:0], self.labels[:0], self.vocab, self.split_idx)


class TensorDL(EpochDL):
    """Takes a batch from the tensor in one indexing: no work, and no worker, per image."""

    def create_batches(self, samples):
        yield from (self.dataset[indices] for indices in chunked(samples, self.bs, self.drop_last))


def _tensor_loaders(data: Data, device: torch.device) -> DataLoaders:
    splits = small_set(data)
    size = data.image_size
    needed = sum(len(images) for images, _ in splits) * splits[0][0].shape[1] * size**2
    if needed > MOST_BYTES:
        raise RecipeError(
            f"data.size: {size} px make {data.name} {needed / 2**30:.0f} GiB, and it is held in memory; use less"
        )
    loaders = [
        TensorDL(
            TensorImages(_resize(images, size).to(device), labels.to(device), class_names(data), split_idx),
            bs=data.batch_size,
            shuffle=split_idx == 0,
            num_workers=0,
            after_batch=[*batch_augmentation(data), IntToFloatTensor(), _normalize(data)],
            device=device,
        )
        for split_idx, (images, labels) in enumerate(splits)
    ]
    return DataLoaders(*loaders, device=device)


def _normalize(data: Data) -> Normalize:
    return Normalize.from_stats(*statistics(data), cuda=False)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    parts = (
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        for part in images.split(256)  # in floats all of them are four times as large
    )
    return torch.cat(list(parts))


# Image files ----------------------------------------------------------------------------------------------


class UnreadableImage(UserError):
    """A file that is no image, or a damaged one: its path and why."""


def open_image(path: Path) -> PILImage:
    """An image file in RGB, decoded by Pillow.

    Pillow, because torchvision's decoders are to be removed, gain a tenth at most, and its decoder of PNG ends the
    process at a damaged file (version 0.29).

    Raises:
        UnreadableImage: the file is no image, a damaged one, or one past Pillow's limit of pixels.
    """
    try:
        image = PILImage.create(path, mode=None)
        if image.mode.startswith("I;16"):  # Pillow would clip it to white
            image = PILImage.create((np.asarray(image) >> 8).astype(np.uint8))
        return image if image.mode == "RGB" else PILImage(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders have no common error
        reason = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise UnreadableImage(path, " ".join(reason.split())) from None


class ImageTransform(Transform):
    """One of torchvision's transforms of a PIL image to bytes [3, H, W], for training or for validation."""

    def __init__(self, function: v2.Transform, split_idx: int):
        super().__init__()
        self.function, self.split_idx = function, split_idx

    def encodes(self, image: PILImage):
        return TensorImage(self.function(image))


class FileDL(EpochDL):
    """Reads images, each augmented by random numbers of its own: the number of workers changes nothing.

    Images that cannot be read are left out of their batch, which carries their names: see `Unreadable`.
    """

    def do_item(self, index: Optional[int]):
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
    """A FileDL of crops that the device resizes: see `ResizeCrops`.

    What workers do beside decoding is mostly resizing. They crop all the same, which costs them no more than a copy: a
    crop is fewer bytes than its image, to the device, too. A batch of crops goes as one tensor, since each tensor takes
    a worker a file descriptor, and a device a transfer.
    """

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]):
        images, labels = zip(*items)
        images = [image.as_subclass(Tensor).permute(1, 2, 0) for image in images]  # as they lie in memory
        crops = torch.cat([image.reshape(-1) for image in images])
        return crops, TensorCategory(torch.stack(labels)), [tuple(image.shape) for image in images]


class ResizeCrops(ItemTransform):
    """The crops of a `CropsDL` batch, of bytes, resized as FileCropFlip does it: bytes [B, 3, size, size]."""

    order = -50  # right after Unreadable

    def __init__(self, size: int):
        self.size = [size, size]

    def encodes(self, batch):
        crops, labels, shapes = batch
        # In floats, all at once: CUDA does not resize bytes, and every call is a kernel.
        parts = crops.float().split([math.prod(shape) for shape in shapes])
        images = [part.view(1, *shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes)]
        images = torch.cat([F.interpolate(image, self.size, mode="bilinear", antialias=True) for image in images])
        return TensorImage(images.round().clamp(0, 255).byte()), labels


class Unreadable(ItemTransform):
    """Takes the names of unreadable images off a batch, and warns of each once, or stops the run.

    In the main process: what a worker raises comes with a traceback.
    """

    order = -100

    def __init__(self, skip: bool):
        self.skip, self.known = skip, set()

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


def _file_loaders(data: Data, device: torch.device) -> DataLoaders:
    files = _image_files(data)
    numbers = range(len(files[0])), range(len(files[0]), len(files[0]) + len(files[1]))
    categorize = Categorize(vocab=class_names(data), sort=False)
    categorize.setups(None)
    datasets = Datasets(
        files[0] + files[1],
        tfms=[[open_image], [parent_label, categorize]],
        splits=[list(split) for split in numbers],
        do_setup=False,  # it would open the first image, and that may be unreadable
    )
    on_device = device.type in RESIZING
    transforms = [
        ImageTransform(training_transform(data, may_leave_large=on_device), 0),
        ImageTransform(evaluation_transform(data), 1),
    ]
    erasing = [RandomErasing()] if "random_erasing" in data.augment else []
    unreadable = Unreadable(skip=data.unreadable == "skip")
    loaders = [
        (CropsDL if crops else FileDL)(
            datasets.subset(split_idx),
            bs=data.batch_size,
            shuffle=split_idx == 0,
            num_workers=data.workers,
            drop_last=False,  # the authors keep the last, smaller batch
            after_item=[*transforms, ToTensor()],
            after_batch=[unreadable, *crops, IntToFloatTensor(), _normalize(data), *erasing],
            pin_memory=device.type == "cuda",
            device=device,
        )
        # Validation is resized by the workers: an image is wanted whole there, and comes but once an epoch.
        for split_idx, crops in enumerate(([ResizeCrops(data.image_size)] * on_device, []))
    ]
    return DataLoaders(*loaders, device=device)


def _image_files(data: Data) -> tuple[list[Path], list[Path]]:
    """Training and validation files; where there is no folder for the latter, a share of each class is held out."""
    train, valid = folder_parts(data)
    if valid:
        return _files_below(train), _files_below(valid)
    files = _files_below(train)
    try:
        # Always the same ones, whatever the seed of the training.
        classes = [path.parent.name for path in files]
        return train_test_split(files, test_size=data.held_out, random_state=0, stratify=classes)
    except ValueError as error:
        reason = str(error).split(".")[0]
        raise RecipeError(f"data.valid_share: cannot hold out {data.held_out} of {train}: {reason}") from None


def _files_below(folder: Path) -> list[Path]:
    try:
        return [Path(path) for path, _ in ImageFolder(folder).samples]
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"data.path: {folder}: {str(error).splitlines()[0]}") from None


def read_image(path: Path, data: Data) -> Tensor:
    """One image file as a network trained on `data` sees validation images: normalised [channels, size, size].

    Raises:
        UserError: the file cannot be read.
    """
    try:
        image = open_image(path)
    except UnreadableImage as error:
        raise UserError("{}: cannot read the image: {}".format(*error.args)) from None
    channels, *size = input_size(data)
    if data.name in FILES:
        steps = [evaluation_transform(data)]
    else:
        steps = [v2.Grayscale() if channels == 1 else v2.Identity(), v2.PILToTensor(), v2.Resize(size, antialias=True)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics(data))]
    return v2.Compose(steps)(image)
