"""A recipe's data section -> fastai DataLoaders.

Small sets are held as one tensor and cut and augmented a batch at a time; ImageNet is read file by file.
"""

import codecs
import pickle
from pathlib import Path

import fastai.vision.data  # noqa: F401  (teaches show_batch and show_results to lay out images)
import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import chunked
from fastai.data.transforms import Categorize, Category, IntToFloatTensor, Normalize, ToTensor, parent_label
from fastai.torch_basics import TensorCategory, TensorImage, TensorImageBW, Transform
from fastai.vision.core import PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from .errors import RecipeError
from .preflight import cifar_folder, image_classes
from .recipe import Data

__all__ = ["build_dataloaders", "class_names", "input_size"]

# Per-channel mean and standard deviation, to the digits that the authors used.
STATISTICS = {
    "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def build_dataloaders(data: Data, device: torch.device) -> DataLoaders:
    """Training and validation DataLoaders of a recipe's data, on a device.

    Batches are normalised images [B, channels, size, size] and class numbers [B].

    Raises:
        RecipeError: files are missing or not what their names promise.
    """
    return (_file_loaders if data.name == "imagenet" else _tensor_loaders)(data, device)


def input_size(data: Data) -> tuple[int, int, int]:
    """Channels, height and width of what the network sees."""
    return (1 if data.name == "digits" else 3), data.image_size, data.image_size


def class_names(data: Data) -> list[str]:
    """The classes in the order of their numbers."""
    if data.name == "digits":
        return [str(digit) for digit in range(10)]
    if data.name == "imagenet":
        return image_classes(data.folder / "train")
    return _cifar_names(cifar_folder(data))


# Small sets -----------------------------------------------------------------------------------------------


class TensorImages:
    """Images [N, C, H, W] in bytes and labels [N], indexed by one number or by a list of them."""

    def __init__(self, images: Tensor, labels: Tensor, vocab: list[str], split_idx: int):
        self.images, self.labels, self.vocab, self.split_idx = images, labels, vocab, split_idx

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        index = torch.as_tensor(index)
        kind = TensorImageBW if self.images.shape[1] == 1 else TensorImage
        return kind(self.images[index]), TensorCategory(self.labels[index])

    def decode(self, item, full: bool = True):
        image, label = item
        return image, Category(self.vocab[int(label)])

    def new_empty(self) -> "TensorImages":
        return TensorImages(self.images[:0], self.labels[:0], self.vocab, self.split_idx)


class TensorDL(TfmdDL):
    """Takes a batch from the tensor in one indexing: no work, and no worker, per image."""

    def create_batches(self, samples):
        yield from (self.dataset[indices] for indices in chunked(samples, self.bs, self.drop_last))


class RandomCropFlip(Transform):
    """Pads by black, crops back at random, and mirrors half of the images; each image its own way."""

    order, split_idx = 5, 0  # in bytes, so before IntToFloatTensor (10); training only

    def __init__(self, padding: int, flip: bool):
        super().__init__()
        self.padding, self.flip = padding, flip

    def encodes(self, x: TensorImage):
        batch, channels, height, width = x.shape
        on = dict(device=x.device)
        rows = torch.randint(2 * self.padding + 1, (batch, 1), **on) + torch.arange(height, **on)
        columns = torch.randint(2 * self.padding + 1, (batch, 1), **on) + torch.arange(width, **on)
        if self.flip:
            columns = torch.where(torch.rand(batch, 1, **on) < 0.5, columns.flip(1), columns)
        sample = torch.arange(batch, **on).view(-1, 1, 1, 1)
        channel = torch.arange(channels, **on).view(1, -1, 1, 1)
        padded = F.pad(x, [self.padding] * 4)
        return padded[sample, channel, rows.view(batch, 1, -1, 1), columns.view(batch, 1, 1, -1)]


def _tensor_loaders(data: Data, device: torch.device) -> DataLoaders:
    train, valid = _digits() if data.name == "digits" else _cifar(data)
    vocab = class_names(data)
    for split in (train, valid):
        if split[1].min() < 0 or split[1].max() >= len(vocab):
            raise RecipeError(f"data.path: {data.folder}: labels outside 0 to {len(vocab) - 1}; is it {data.name}?")
    train, valid = ((_resize(images, data.image_size), labels) for images, labels in (train, valid))
    statistics = STATISTICS.get(data.name) or _statistics(train[0])
    crop = RandomCropFlip(padding=data.image_size // 8, flip=data.name != "digits")
    after_batch = [crop, IntToFloatTensor(), Normalize.from_stats(*statistics, cuda=False)]
    loaders = [
        TensorDL(
            TensorImages(*split, vocab, split_idx),
            bs=data.batch_size,
            shuffle=split_idx == 0,
            num_workers=0,
            after_batch=after_batch,
            device=device,
        )
        for split_idx, split in enumerate((train, valid))
    ]
    return DataLoaders(*loaders, device=device)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


def _statistics(images: Tensor) -> tuple[list[float], list[float]]:
    values = images.float().div(255).transpose(0, 1).flatten(1)
    return values.mean(1).tolist(), values.std(1).tolist()


def _digits():
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fifth is held out, the same one always."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(images * 255 / 16)).byte().view(-1, 1, 8, 8)
    train, valid = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    labels = torch.from_numpy(labels).long()
    return (images[train], labels[train]), (images[valid], labels[valid])


# CIFAR's files --------------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Reads what CIFAR's pickles hold, dictionaries of numpy arrays, and refuses to run anything else."""

    _allowed = {
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy._core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "_codecs.encode": codecs.encode,
    }

    def find_class(self, module, name):
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array") from None


def _cifar_files(folder: Path) -> tuple[list[str], list[str], str]:
    """Training files, test files and the key of the labels, in CIFAR's four folders."""
    return {
        "cifar-10-batches-py": ([f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "labels"),
        "cifar-10-batches-bin": ([f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"], ""),
        "cifar-100-python": (["train"], ["test"], "fine_labels"),
        "cifar-100-binary": (["train.bin"], ["test.bin"], ""),
    }[folder.name]


def _cifar(data: Data):
    folder = cifar_folder(data)
    *splits, key = _cifar_files(folder)
    loaded = []
    for files in splits:
        images, labels = zip(*(_cifar_file(folder / file, key) for file in files))
        loaded.append((torch.cat(images), torch.cat(labels)))
    return loaded


def _cifar_file(path: Path, key: str) -> tuple[Tensor, Tensor]:
    if path.suffix == ".bin":  # rows of one label byte (CIFAR-100: a coarse one before it) and 3,072 pixels
        row = 3072 + (2 if path.parent.name == "cifar-100-binary" else 1)
        content = np.frombuffer(_cifar_read(path, lambda file: file.read()), np.uint8)
        if not content.size or content.size % row:
            raise RecipeError(f"data.path: {path} is damaged: {content.size:,} bytes are no whole number of images")
        rows = content.reshape(-1, row)
        images, labels = rows[:, -3072:], rows[:, -3073]
    else:
        content = _cifar_read(path, lambda file: _ArraysOnly(file, encoding="latin1").load())
        try:
            images, labels = content["data"].reshape(-1, 3072), np.asarray(content[key])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"data.path: {path} does not hold CIFAR's images and labels ({error})") from None
        if len(images) != len(labels) or images.dtype != np.uint8:
            raise RecipeError(f"data.path: {path} does not hold CIFAR's images and labels")
    images = torch.from_numpy(images.copy()).view(-1, 3, 32, 32)
    return images, torch.from_numpy(labels.astype(np.int64))


def _cifar_names(folder: Path) -> list[str]:
    binary = folder.name.endswith(("-bin", "-binary"))
    if binary:
        name = "batches.meta.txt" if folder.name == "cifar-10-batches-bin" else "fine_label_names.txt"
        return _cifar_read(folder / name, lambda file: file.read()).decode().split()
    name, key = {
        "cifar-10-batches-py": ("batches.meta", "label_names"),
        "cifar-100-python": ("meta", "fine_label_names"),
    }[folder.name]
    content = _cifar_read(folder / name, lambda file: _ArraysOnly(file, encoding="latin1").load())
    try:
        return [str(label) for label in content[key]]
    except (KeyError, TypeError) as error:
        raise RecipeError(f"data.path: {folder / name} does not hold CIFAR's class names ({error})") from None


def _cifar_read(path: Path, read):
    try:
        with open(path, "rb") as file:
            return read(file)
    except OSError as error:
        raise RecipeError(f"data.path: cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise RecipeError(f"data.path: {path} is damaged: {str(error) or type(error).__name__}") from None


# Image files ----------------------------------------------------------------------------------------------


class ImageTransform(Transform):
    """One of torchvision's transforms of a PIL image, for training or for validation."""

    def __init__(self, function, split_idx: int):
        super().__init__()
        self.function, self.split_idx = function, split_idx

    def encodes(self, image: PILImage):
        return self.function(image)


def _file_loaders(data: Data, device: torch.device) -> DataLoaders:
    size = data.image_size
    files = [_image_files(data.folder / part) for part in ("train", "val")]
    numbers = range(len(files[0])), range(len(files[0]), len(files[0]) + len(files[1]))
    datasets = Datasets(
        files[0] + files[1],
        tfms=[[PILImage.create], [parent_label, Categorize(vocab=class_names(data), sort=False)]],
        splits=[list(split) for split in numbers],
    )
    train = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    valid = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])
    return datasets.dataloaders(
        bs=data.batch_size,
        val_bs=data.batch_size,
        num_workers=data.workers,
        shuffle=True,
        drop_last=False,  # the authors keep the last, smaller batch
        after_item=[ImageTransform(train, 0), ImageTransform(valid, 1), ToTensor()],
        after_batch=[IntToFloatTensor(), Normalize.from_stats(*STATISTICS["imagenet"], cuda=False)],
        pin_memory=device.type == "cuda",
        device=device,
    )


def _image_files(folder: Path) -> list[Path]:
    try:
        return [Path(path) for path, _ in ImageFolder(folder).samples]
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"data.path: {folder}: {str(error).splitlines()[0]}") from None
