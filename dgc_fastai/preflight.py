"""Does this machine have what a recipe needs? Asked before torch is imported or a byte of data is read."""

import ctypes
import os
import platform
from pathlib import Path

from .errors import RecipeError
from .recipe import Data, Recipe

__all__ = ["preflight"]

# What CIFAR's two archives unpack to, in both of their formats.
CIFAR_FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}


def preflight(recipe: Recipe) -> None:
    """Check a recipe's data folder, output folder and device, writing nothing.

    Raises:
        RecipeError: the first thing that is missing, with the recipe's key and the remedy.
    """
    check_data(recipe.data)
    check_output(recipe.runs)
    check_device(recipe)


def check_data(data: Data) -> None:
    """See that the folder has the layout of the data it is named for."""
    if data.name == "digits":
        return
    if not data.folder.is_dir():
        raise RecipeError(f"data.path: there is no folder {data.folder}; set data.path to where {data.name} lies")
    if data.name in CIFAR_FOLDERS:
        cifar_folder(data)
    else:
        train, valid = (image_classes(data.folder / part) for part in ("train", "val"))
        if train != valid:
            odd = sorted(set(train) ^ set(valid))[:3]
            raise RecipeError(f"data.path: {data.folder}: train and val differ in their classes: {', '.join(odd)}")


def cifar_folder(data: Data) -> Path:
    """The folder of CIFAR's files, below `data.path` or `data.path` itself."""
    names = CIFAR_FOLDERS[data.name]
    candidates = [data.folder / name for name in names] + [data.folder] * (data.folder.name in names)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise RecipeError(
        f"data.path: {data.folder} holds no {names[0]}; unpack {data.name}'s archive there, or fetch it with "
        f"torchvision.datasets.{data.name.upper()}({str(data.folder)!r}, download=True)"
    )


def image_classes(folder: Path) -> list[str]:
    """The names of a folder's subfolders, sorted: one a class."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise RecipeError(f"data.path: cannot read {folder}: {error.strerror}; ImageNet has train/ and val/") from None
    if len(names) < 2:
        raise RecipeError(f"data.path: {folder} holds {len(names)} class folders; it needs one for each class")
    return names


def check_output(folder: Path) -> None:
    """See that run folders can be made, without making any."""
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise RecipeError(f"output: {place} is not a folder; set output to one that run folders can go below")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RecipeError(f"output: {place} is not writable; set output to a folder of yours")


def check_device(recipe: Recipe) -> None:
    """See that the device is there, and that it can do the precision."""
    kind, _, number = recipe.device.partition(":")
    found = cuda_devices() if kind in ("auto", "cuda") else 0
    if kind == "cuda" and not found:
        raise RecipeError(f"device: {recipe.device}, but this machine has no CUDA driver or GPU; use device=cpu")
    if kind == "cuda" and int(number or 0) >= found:
        raise RecipeError(f"device: {recipe.device}, but there are {found} GPUs, counted from 0")
    if kind == "mps" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        raise RecipeError("device: mps, but this is no Mac with Apple silicon; use device=cpu")
    if recipe.train.precision != "float32" and not found:
        raise RecipeError(f"train.precision: {recipe.train.precision} needs a CUDA device; use float32 here")


def cuda_devices() -> int:
    """The number of CUDA devices the driver shows, by asking the driver itself."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return 0
        return count.value
    except (OSError, AttributeError):
        return 0
