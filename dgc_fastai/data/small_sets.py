"""Files of the small sets -> uint8 images [N, C, H, W] and labels [N], for training and for validation."""

import gzip
import io
import math
import pickle
import zlib
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..recipe.machine import cifar_folder, idx_files
from ..recipe.schema import Data
from ..utils.errors import RecipeError

__all__ = ["small_set", "small_set_classes"]

Split = tuple[Tensor, Tensor]

MAX_BYTES = 2**30  # of a decompressed file
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def small_set(data: Data) -> tuple[Split, Split]:
    """Read a set that fits into memory: digits, Fashion-MNIST or CIFAR.

    Raises:
        RecipeError: a file is missing, damaged, or of another format than its name says.
    """
    splits = {"digits": _digits, "fashion_mnist": _fashion_mnist}.get(data.name, _cifar)(data)
    classes = _class_count(data.name)
    for _, labels in splits:
        if labels.min() < 0 or labels.max() >= classes:
            raise RecipeError(f"data.path: {data.folder}: labels outside 0 to {classes - 1}; is it {data.name}?")
    return splits


def _class_count(name: str) -> int:
    return 100 if name == "cifar100" else 10


def small_set_classes(data: Data) -> list[str]:
    """The classes of a small set in the order of their numbers.

    Raises:
        RecipeError: the file with CIFAR's class names is missing or damaged.
    """
    if data.name == "digits":
        return [str(digit) for digit in range(10)]
    if data.name == "fashion_mnist":
        return FASHION
    folder = cifar_folder(data)
    names = _cifar_names(folder)
    if len(names) != _class_count(data.name):
        raise RecipeError(f"data.path: {folder}: {len(names)} class names; is it {data.name}?")
    return names


def _digits(data: Data) -> tuple[Split, Split]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; always the same fifth is held out."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(images * 255 / 16)).byte().view(-1, 1, 8, 8)
    train, valid = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    labels = torch.from_numpy(labels).long()
    return (images[train], labels[train]), (images[valid], labels[valid])


def _read(path: Path, read):
    """The result of `read(file)`; any error becomes a RecipeError that names the file."""
    try:
        with open(path, "rb") as file:
            return read(file)
    except OSError as error:
        raise RecipeError(f"data.path: cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise RecipeError(f"data.path: {path} is damaged: {str(error) or type(error).__name__}") from None


# Fashion-MNIST's idx format, big-endian: two zero bytes, type 8 (uint8), the number of axes, their lengths, the values


def _fashion_mnist(data: Data) -> tuple[Split, Split]:
    splits = []
    for images_path, labels_path in idx_files(data):
        images, labels = _idx_file(images_path, axes=3), _idx_file(labels_path, axes=1)
        if len(images) != len(labels) or not len(labels):
            raise RecipeError(f"data.path: {data.folder}: {len(images)} images, but {len(labels)} labels")
        splits.append((images.unsqueeze(1), labels.long()))
    train, test = splits
    return train, test


def _idx_file(path: Path, axes: int) -> Tensor:
    content = _read(path, lambda file: file.read())
    if path.suffix == ".gz":
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise RecipeError(f"data.path: {path} is damaged: {error}") from None
    head = 4 + 4 * axes
    shape = np.frombuffer(content[4:head], ">u4").tolist() if len(content) >= head else [-1]
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) != head + math.prod(shape):
        raise RecipeError(f"data.path: {path} is damaged: it is not an idx file of {axes} axes in bytes")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy())


# CIFAR's pickles and binary files


class _Array:
    """Stands in for numpy's arrays and dtypes while a pickle is read: a crafted pickle could make numpy's own read from
    any address."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state

    def bytes(self) -> np.ndarray:
        """The array of uint8."""
        _, shape, kind, fortran_order, content = self.state
        if kind.arguments[0] != "u1":
            raise ValueError(f"not bytes, but {kind.arguments[0]}")
        content = content.encode("latin1") if isinstance(content, str) else content  # written by Python 2
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran_order else "C")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it names the encoding {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of arrays, which is all that CIFAR's pickles hold, and refuses every other global."""

    _allowed = {
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy._core.multiarray._reconstruct": _Array,
        "numpy.ndarray": _Array,
        "numpy.dtype": _Array,
        "_codecs.encode": _encode,
    }

    def find_class(self, module, name):
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array") from None


def _cifar_files(folder: Path) -> tuple[list[str], list[str], str]:
    """Training files, test files and the key of the labels, for each of CIFAR's four folders."""
    return {
        "cifar-10-batches-py": ([f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "labels"),
        "cifar-10-batches-bin": ([f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"], ""),
        "cifar-100-python": (["train"], ["test"], "fine_labels"),
        "cifar-100-binary": (["train.bin"], ["test.bin"], ""),
    }[folder.name]


def _cifar(data: Data) -> tuple[Split, Split]:
    folder = cifar_folder(data)
    *splits, key = _cifar_files(folder)
    loaded = []
    for files in splits:
        images, labels = zip(*(_cifar_file(folder / file, key) for file in files))
        loaded.append((torch.cat(images), torch.cat(labels)))
    train, test = loaded
    return train, test


def _cifar_file(path: Path, key: str) -> tuple[Tensor, Tensor]:
    if path.suffix == ".bin":  # rows: a coarse label in CIFAR-100 only, the label, 3,072 pixels
        row = 3072 + (2 if path.parent.name == "cifar-100-binary" else 1)
        content = np.frombuffer(_read(path, lambda file: file.read()), np.uint8)
        if not content.size or content.size % row:
            raise RecipeError(f"data.path: {path} is damaged: {content.size:,} bytes are not a whole number of images")
        rows = content.reshape(-1, row)
        images, labels = rows[:, -3072:], rows[:, -3073]
    else:
        content = _read(path, lambda file: _ArraysOnly(file, encoding="latin1").load())
        try:
            images = content["data"].bytes().reshape(-1, 3072)
            labels = np.asarray(content[key]).astype(np.int64, casting="safe")
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"data.path: {path} does not hold CIFAR's images and labels ({error})") from None
        if labels.shape != (len(images),):
            raise RecipeError(f"data.path: {path} does not hold CIFAR's images and labels")
    return torch.from_numpy(images.copy()).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


def _cifar_names(folder: Path) -> list[str]:
    binary = folder.name.endswith(("-bin", "-binary"))
    if binary:
        name = "batches.meta.txt" if folder.name == "cifar-10-batches-bin" else "fine_label_names.txt"
        return _read(folder / name, lambda file: file.read()).decode().split()
    name, key = {
        "cifar-10-batches-py": ("batches.meta", "label_names"),
        "cifar-100-python": ("meta", "fine_label_names"),
    }[folder.name]
    content = _read(folder / name, lambda file: _ArraysOnly(file, encoding="latin1").load())
    try:
        return [str(label) for label in content[key]]
    except (KeyError, TypeError) as error:
        raise RecipeError(f"data.path: {folder / name} does not hold CIFAR's class names ({error})") from None
