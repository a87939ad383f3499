"""The device to compute on, and what suits it."""

from collections.abc import Callable
from functools import partial

import torch

from ..recipe.schema import Recipe
from ..utils import launch
from ..utils.errors import RecipeError


def select_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        RecipeError: this build of torch cannot use it, or there are not as many GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device: {name}, but this installation of torch cannot use CUDA; use device=cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RecipeError(f"device: {name}, but this installation of torch cannot use it; use device=cpu")
    if name == "cuda":  # torch.cuda.set_device needs an index
        name = f"cuda:{launch.local_rank()}"
    device = torch.device(name)
    if kind == "cuda" and device.index >= torch.cuda.device_count():
        raise RecipeError(
            f"device: {name}, but the highest here is cuda:{torch.cuda.device_count() - 1}; use one that exists, or as "
            "many processes as there are GPUs"
        )
    return device


def use_device(name: str) -> torch.device:
    """The device of `select_device`, made ready: on CUDA, cuDNN tries its kernels, and convolutions may use TF32.

    Raises:
        RecipeError: as `select_device`.
    """
    device = select_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    return device


def resolve(recipe: Recipe, device: torch.device) -> Recipe:
    """A recipe whose precision and memory format are those that it has on a device.

    Raises:
        RecipeError: the device does not compute in the recipe's precision.
    """
    train = recipe.train
    return recipe.resolved(select_precision(train.precision, device), select_channels_last(train.channels_last, device))


def select_precision(name: str, device: torch.device) -> str:
    """The precision that a recipe names: `float32`, `bf16`, `fp16`, or `auto` for what the device computes fast.

    `auto` is bf16 on GPUs with bf16 units (compute capability 8.0), fp16 on older ones with fp16 matrix units (7.0),
    and float32 elsewhere.

    Raises:
        RecipeError: the device does not compute in it. A GPU without bf16 units only emulates it, at a loss.
    """
    has_bf16 = has_fp16 = False
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        has_bf16, has_fp16 = capability >= (8, 0) or torch.version.hip is not None, capability >= (7, 0)
    if name == "auto":
        return "bf16" if has_bf16 else "fp16" if has_fp16 else "float32"
    if name == "fp16" and device.type != "cuda":
        raise RecipeError("train.precision: fp16 needs a CUDA device; use bf16 or float32 here")
    if name == "bf16" and device.type == "cuda" and not has_bf16:
        has = ".".join(map(str, capability))
        raise RecipeError(
            f"train.precision: bf16, but {torch.cuda.get_device_name(device)} has no bf16 units (compute capability "
            f"{has}; 8.0 has them); use {'fp16 or ' if has_fp16 else ''}float32"
        )
    return name


def select_channels_last(wanted: bool | None, device: torch.device) -> bool:
    """Whether to compute in channels-last memory format: as a recipe says, by default on CUDA, where it is faster."""
    return device.type == "cuda" if wanted is None else wanted


def device_wait(device: torch.device) -> Callable[[], None]:
    """A function that returns when the device has finished its work."""
    return (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
