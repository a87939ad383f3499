"""The C++ kernel: its library, and its functions by name and type."""

import ctypes
import functools
import logging
import subprocess
from collections.abc import Callable

import torch

from . import build, structures

__all__ = ["TYPES", "acc_dtype", "function", "library"]

TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
"""The types of images that the kernel is compiled for."""

_ARGUMENTS: dict[str, tuple[type[ctypes.Structure], ...]] = {
    "pack_weight": (structures.ConvDesc, structures.PackArgs),
    "pack_winograd_weight": (structures.ConvDesc, structures.PackArgs),
    "gated_conv2d": (structures.ConvDesc, structures.PackedLayer, structures.ForwardArgs),
    "gated_layer": (structures.ConvDesc, structures.PackedLayer, structures.ForwardArgs),
    "group_conv2d": (structures.ConvDesc, structures.PackedLayer, structures.ForwardArgs),
    "stem": (structures.ConvDesc, structures.PackedLayer, structures.ForwardArgs),
    "backward_input": (structures.ConvDesc, structures.PackedLayer, structures.BackwardArgs),
    "backward_weight": (structures.ConvDesc, structures.PackedLayer, structures.BackwardArgs),
    "backward_pointwise": (structures.ConvDesc, structures.PackedLayer, structures.BackwardArgs),
    "backward_weight_scratch": (structures.ConvDesc,),
}

log = logging.getLogger(__name__)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that the kernel accumulates in for images of this type; also that of all parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """A function of csrc/kernel.cpp for images of this type. It is called with the structures in `_ARGUMENTS`; only
    those whose name ends in "scratch" return a number.

    Raises:
        KeyError: there is no such function.
    """
    found = getattr(library(), f"dgc_{name}_{TYPES[dtype]}")
    found.argtypes = [ctypes.POINTER(structure) for structure in _ARGUMENTS[name]]
    found.restype = ctypes.c_int64 if name.endswith("scratch") else None
    return found


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernel, built if it has not been on this machine. None where it cannot be, which is logged once.

    Raises:
        RuntimeError: its structures are not those of `structures`.
    """
    try:
        loaded = ctypes.CDLL(str(build.build()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()
        log.warning(
            "The C++ kernel for DGC layers cannot be built (%s): slower backends take its place. A C++ compiler, such "
            "as g++, or CXX set to the path of one, makes it available.",
            reason[0] if reason else type(error).__name__,
        )
        return None
    loaded.dgc_describe_structures.restype = ctypes.c_char_p
    theirs, ours = loaded.dgc_describe_structures().decode(), structures.describe()
    if theirs != ours:
        raise RuntimeError(f"csrc/descriptors.h and structures.py differ:\n{theirs}\n{ours}")
    return loaded
