"""`gated_conv2d` for 1x1 filters as a C++ kernel that visits kept channels only, where they lie; see cpu.cpp.

The kernel is built when it is first needed, in a few seconds, and kept in the user's cache. Without a compiler
everything works by the other formulations.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from . import per_sample
from .per_sample import Pair

SOURCE = Path(__file__).with_suffix(".cpp")
TYPES = {torch.float32: "float32", torch.float64: "float64"}
VECTORS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]}

log = logging.getLogger("dgc_fastai")


def takes(x: Tensor, weight: Tensor, padding: Pair) -> bool:
    """Whether the kernel is there and made for such a layer."""
    return (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and weight.dtype == x.dtype
        and per_sample.is_pointwise(weight.shape, padding)
        and x.is_contiguous()
        and library() is not None
    )


def forward(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`."""
    seen = per_sample.seen(x, stride)
    y = seen.new_empty(len(seen), len(weight), *seen.shape[2:])
    _call("forward", seen, gates, weight, seen, _gates(gates, x), _table(weight, gates), y)
    return y


def backward(
    grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, gates and weight; nothing is computed for dropped channels."""
    seen, table, values = per_sample.seen(x, stride), _table(weight, gates), _gates(gates, x)
    dseen, dvalues = torch.empty_like(seen), torch.zeros_like(values)
    dtables = table.new_zeros(torch.get_num_threads(), *table.shape)
    _call("backward", seen, gates, weight, grad.contiguous(), seen, values, table, dseen, dvalues, dtables)
    dweight = dtables.sum(0).permute(2, 0, 1).reshape(weight.shape)
    if seen is x:
        return dseen, dvalues.to(gates.dtype), dweight
    dx = torch.zeros_like(x)
    dx[:, :, :: stride[0], :: stride[1]] = dseen
    return dx, dvalues.to(gates.dtype), dweight


def _gates(gates: Tensor, x: Tensor) -> Tensor:
    return gates.to(x.dtype).contiguous()


def _table(weight: Tensor, gates: Tensor) -> Tensor:
    """[heads, C, O / heads]: what a kept channel needs lies together."""
    return weight.flatten(1).unflatten(0, (-1, gates.shape[1])).permute(1, 2, 0).contiguous()


def _call(name: str, seen: Tensor, gates: Tensor, weight: Tensor, *tensors: Tensor) -> None:
    batch, heads, channels = gates.shape
    shape = (ctypes.c_int64 * 5)(batch, heads, channels, len(weight) // heads, seen.shape[2] * seen.shape[3])
    function = getattr(library(), f"dgc_{name}_{TYPES[seen.dtype]}")
    function(shape, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))


@functools.cache
def library() -> Optional[ctypes.CDLL]:
    """The kernel, built if it has not been on this machine; None where it cannot be, which the log says once."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()
        log.warning(
            "The C++ kernel for 1x1 DGC layers cannot be built (%s): slower formulations take its place. A C++ "
            "compiler, such as g++, or CXX set to the path of one, makes it available.",
            reason[0] if reason else type(error).__name__,
        )
        return None


def _built() -> Path:
    if platform.system() == "Windows":
        raise OSError("not on Windows yet")
    compiler = shutil.which(os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++"))
    if compiler is None:
        raise OSError("there is no C++ compiler")
    torch_folder = Path(torch.__file__).parent
    compiling = ["-O3", "-std=c++17", "-fPIC", *VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    compiling += [f"-I{torch_folder / 'include'}", "-c", str(SOURCE)]
    if platform.system() == "Linux":
        # Not for linking: the OpenMP that PyTorch has brought along is to be used, threads and all.
        compiling.append("-fopenmp")
    linking = ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    recipe = torch.__version__, compiler, compiling, linking
    key = hashlib.sha256(SOURCE.read_bytes() + repr(recipe).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgc_fastai"
    target = folder / f"cpu-{key}.so"
    if not target.exists():
        log.info("Building the C++ kernel for 1x1 DGC layers, once, in %s", folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may build at a time
            run = functools.partial(subprocess.run, cwd=scratch, check=True, capture_output=True, text=True)
            run([compiler, *compiling, "-o", "cpu.o"])
            run([compiler, "cpu.o", *linking, "-o", target.name])
            os.replace(Path(scratch) / target.name, target)
    return target
