"""Whether this machine has what a recipe needs. Checked before torch is imported and before data are read."""

import ctypes
import importlib.util
import mimetypes
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..utils import launch
from ..utils.errors import RecipeError
from .schema import Data, Recipe

__all__ = ["check_machine"]

FETCH = {
    "fashion_mnist": "install Debian's package dataset-fashion-mnist, or fetch it with "
    "torchvision.datasets.FashionMNIST(FOLDER, download=True) and set data.path to FOLDER",
}
# The folders in CIFAR's archives, in both formats.
CIFAR_FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}


def check_machine(recipe: Recipe, resume: bool = False) -> None:
    """Check a recipe's data folder, weights, output folder, processes, device, compiler and loggers. Writes nothing.

    Args:
        resume: the run may have begun, and need the weights that it started from no more.

    Raises:
        RecipeError: the first thing that is missing, with the recipe's key and what to do.
    """
    check_data(recipe.data)
    if not resume:
        check_file(recipe.model.weights_file, "model.weights")
    check_file(recipe.train.teacher_file, "train.teacher")
    check_output(recipe.runs)
    check_distributed(recipe)
    check_device(recipe)
    check_compiler(recipe.train.compile, "train.compile")
    check_loggers(recipe.log.loggers)


def check_data(data: Data) -> None:
    """Check that the folder has the layout of the data set."""
    if data.name == "digits":
        return
    if not data.folder.is_dir():
        hint = FETCH.get(data.name, f"set data.path to the folder of {data.name}")
        raise RecipeError(f"data.path: there is no folder {data.folder}; {hint}")
    if data.name in CIFAR_FOLDERS:
        cifar_folder(data)
    elif data.name == "fashion_mnist":
        idx_files(data)
    else:
        parts = [(part, image_classes(part)) for part in folder_parts(data) if part]
        if data.valid_share and len(parts) == 2:
            raise RecipeError(f"data.valid_share: {parts[1][0]} holds the validation images; leave valid_share out")
        (train, classes), (valid, others) = parts[0], parts[-1]
        if classes != others:
            odd = ", ".join(sorted(set(classes) ^ set(others))[:3])
            raise RecipeError(f"data.path: {train} and {valid.name} differ in their classes: {odd}")


def check_file(path: Path | None, key: str) -> None:
    """Check that a file of weights, or the run folder that has it, is there."""
    if path and not path.exists():
        others = {"model.weights": "'pretrained', 'auto', 'hf-hub:OWNER/NAME'", "train.teacher": "'before'"}[key]
        raise RecipeError(f"{key}: there is no file {path}; {key} is a file of weights, a run folder, or {others}")
    if path and path.is_dir() and not (path / "best.safetensors").is_file():
        raise RecipeError(f"{key}: {path} has no best.safetensors; name a file of weights, or the folder of a run")


def idx_files(data: Data) -> list[tuple[Path, Path]]:
    """Fashion-MNIST's images and labels, for training and for test: in `data.path`, or below it as torchvision does.

    The files may be gzipped.
    """
    for folder in (data.folder, data.folder / "FashionMNIST" / "raw"):
        found = [
            next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
            for part in ("train", "t10k")
            for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        ]
        if all(found):
            images, labels, test_images, test_labels = (path for path in found if path)
            return [(images, labels), (test_images, test_labels)]
    missing = "train-images-idx3-ubyte and the other three files"
    raise RecipeError(f"data.path: {data.folder} has no {missing}; {FETCH[data.name]}")


def folder_parts(data: Data) -> tuple[Path, Path | None]:
    """The folders of the training and the validation images. The second is None if a share is to be held out."""
    train = data.folder / "train"
    if data.name == "imagenet":
        return train, data.folder / "val"
    if not train.is_dir():
        return data.folder, None
    valid = (data.folder / name for name in ("val", "valid", "validation", "test"))
    return train, next((folder for folder in valid if folder.is_dir()), None)


def cifar_folder(data: Data) -> Path:
    """The folder of CIFAR's files: below `data.path`, or `data.path` itself."""
    names = CIFAR_FOLDERS[data.name]
    candidates = [data.folder / name for name in names] + [data.folder] * (data.folder.name in names)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise RecipeError(
        f"data.path: {data.folder} has no {names[0]}; unpack {data.name}'s archive there, or fetch it with "
        f"torchvision.datasets.{data.name.upper()}({str(data.folder)!r}, download=True)"
    )


def image_classes(folder: Path) -> list[str]:
    """The names of the class folders, sorted.

    Raises:
        RecipeError: the folder cannot be read, or has fewer than two class folders.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
        names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        hint = "there must be a folder of images for each class, below train/ and val/"
        raise RecipeError(f"data.path: cannot read {folder}: {error.strerror}; {hint}") from None
    if len(names) < 2:
        pictures = sorted(entry.name for entry in entries if _is_picture(entry.name) and entry.is_file())
        found = f"{len(names)} class folder{'' if len(names) == 1 else 's'}"
        if pictures:
            found += f" and {len(pictures)} picture{'' if len(pictures) == 1 else 's'} outside of them"
        example = pictures[0] if pictures else "1.jpg"
        raise RecipeError(
            f"data.path: {folder} has {found}; put the pictures into one folder for each class, such as "
            f"{folder / 'cat' / example} and {folder / 'dog' / '2.jpg'}"
        )
    return names


def _is_picture(name: str) -> bool:
    return (mimetypes.guess_type(name)[0] or "").startswith("image/")


def check_output(folder: Path) -> None:
    """Check that run folders can be created, without creating one."""
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise RecipeError(f"output: {place} is not a folder; set output to a folder for the runs")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RecipeError(f"output: {place} is not writable; set output to a folder that is")


def check_device(recipe: Recipe) -> None:
    """Check that the device is there and supports the precision."""
    kind, _, number = recipe.device.partition(":")
    found = cuda_devices() if kind in ("auto", "cuda") else 0
    if kind == "cuda" and not found:
        raise RecipeError(f"device: {recipe.device}, but this machine has no CUDA driver or GPU; use device=cpu")
    if kind == "cuda" and int(number or 0) >= found:
        raise RecipeError(f"device: {recipe.device}, but there are {found} GPUs, counted from 0")
    if found and launch.local_rank() >= found:
        raise RecipeError(f"device: {recipe.device}, but {found} GPUs for more processes; start one process per GPU")
    if kind == "mps" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        raise RecipeError("device: mps, but this is not a Mac with Apple silicon; use device=cpu")
    if recipe.train.precision == "fp16" and not found:
        raise RecipeError("train.precision: fp16 needs a CUDA device; use bf16 or float32 here")
    capability = cuda_capability(int(number or launch.local_rank())) if found else None
    if recipe.train.precision == "bf16" and capability and capability < (8, 0):
        has = ".".join(map(str, capability))
        raise RecipeError(
            f"train.precision: bf16, but this GPU has no bf16 units (compute capability {has}; 8.0 has them); use "
            "auto, fp16 or float32"
        )
    if recipe.train.precision == "bf16" and kind == "mps":
        raise RecipeError("train.precision: bf16 needs a CUDA device or a CPU; use float32 here")


def check_distributed(recipe: Recipe) -> None:
    """Check that the recipe suits the processes that torchrun or accelerate started."""
    count, precision = launch.world_size(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if recipe.data.batch_size % count:
        raise RecipeError(
            f"data.batch_size: {recipe.data.batch_size} images cannot be divided evenly among {count} processes; "
            f"use a multiple of {count}"
        )
    if count > 1 and recipe.device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"device: {recipe.device} is one device, for {count} processes; use auto, cuda or cpu")
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}") == "true":
            raise RecipeError(
                f"accelerate is configured for {engine}; choose plain data parallelism: accelerate config"
            )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiler.upper() != "NO":
        raise RecipeError(
            f"train.compile: accelerate is configured to compile with {compiler}; set it in the recipe only"
        )
    if precision not in ("no", recipe.train.precision):
        raise RecipeError(
            f"train.precision: {recipe.train.precision}, but accelerate is configured for mixed precision {precision}; "
            f"set it in the recipe only"
        )


def check_compiler(wanted: bool, name: str) -> None:
    """Check for the C++ compiler that torch.compile needs, if it is wanted by the option `name`."""
    compiler = os.environ.get("CXX") or {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    if wanted and shutil.which(compiler) is None:
        raise RecipeError(f"{name}: torch.compile needs a C++ compiler, and there is no {compiler}; install one")


def check_loggers(names: Iterable[str]) -> None:
    """Check that each logger is installed, without importing it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"log.loggers: {name} is not installed; try pip install {name}")


def cuda_devices() -> int:
    """Number of CUDA devices, asked from the driver itself."""
    count = ctypes.c_int(0)
    try:
        driver = _cuda_driver()
        return 0 if driver.cuDeviceGetCount(ctypes.byref(count)) else count.value
    except (OSError, AttributeError):
        return 0


def cuda_capability(index: int) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, such as (8, 0); None if the driver does not tell."""
    device, parts = ctypes.c_int(0), (ctypes.c_int(0), ctypes.c_int(0))
    try:
        driver = _cuda_driver()
        failed = driver.cuDeviceGet(ctypes.byref(device), index)
        for part, attribute in zip(parts, (75, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
    except (OSError, AttributeError):
        return None
    return None if failed else (parts[0].value, parts[1].value)


def _cuda_driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    if driver.cuInit(0):
        raise OSError("the CUDA driver does not start")
    return driver
