"""The device to compute on."""

import torch

from ..utils import launch
from ..utils.errors import RecipeError


def select_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        RecipeError: this build of torch cannot use it.
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
    return torch.device(name)


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
