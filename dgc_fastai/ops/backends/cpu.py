"""`gated_conv2d` as a C++ kernel that visits kept channels only, where they lie; see csrc/kernel.cpp.

The kernel is built when it is first needed, in some seconds, and kept in the user's cache. Without a compiler
everything works by the other formulations.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional, Union

import torch
from torch import Tensor

from . import per_sample
from .per_sample import Pair

KERNEL = Path(__file__).parents[1] / "csrc" / "kernel.cpp"
TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
VECTORS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]}

log = logging.getLogger("dgc_fastai")


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is there and made for such a layer."""
    return (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and weight.dtype == x.dtype
        and x.is_contiguous()
        and library() is not None
    )


def forward(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`."""
    shape = _shape(x.shape, gates.shape[1], weight.shape, stride, padding, dilation)
    y = _result(x, shape)
    _call("forward", x.dtype, shape, x, _summed_with(x, gates), table(weight, gates.shape[1]), y)
    return y


def backward(
    grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, gates and weight; nothing is computed for dropped channels."""
    if x.dtype == torch.bfloat16:  # sums of many, and read as often
        found = backward(grad.float(), x.float(), gates, weight.float(), stride, padding, dilation)
        return found[0].to(x.dtype), found[1], found[2].to(weight.dtype)
    grad, values, filters = grad.contiguous(), _summed_with(x, gates), table(weight, gates.shape[1])
    dvalues = torch.zeros_like(values)
    if per_sample.is_pointwise(weight.shape, padding):
        seen = per_sample.seen(x, stride)
        shape = _shape(seen.shape, gates.shape[1], weight.shape, (1, 1), (0, 0), (1, 1))
        dx = torch.empty_like(seen)
        parts = filters.new_zeros(torch.get_num_threads(), *gates.shape[1:], len(weight) // gates.shape[1])
        _call("backward_pointwise", x.dtype, shape, grad, seen, values, filters, dx, dvalues, parts)
        dweight = parts.sum(0).permute(2, 0, 1).reshape(weight.shape)
        if seen is not x:
            dx, dseen = torch.zeros_like(x), dx
            dx[:, :, :: stride[0], :: stride[1]] = dseen
    else:
        shape = _shape(x.shape, gates.shape[1], weight.shape, stride, padding, dilation)
        dx, dweight = torch.zeros_like(x), weight.new_empty(weight.shape)
        _call("backward_inputs", x.dtype, shape, grad, x, values, filters, dx, dvalues)
        across = x.new_empty(_call("across", x.dtype, shape))
        _call("backward_filters", x.dtype, shape, grad, x, values, across, dweight)
    return dx, dvalues.to(gates.dtype), dweight


def takes_layer(x: Tensor, filters: Tensor) -> bool:
    """Whether `layer` is there and made for such an input, the images of which may be apart from one another."""
    channels, height, width = x.shape[1:]
    return (
        filters.numel() > 0
        and x.device.type == "cpu"
        and x.dtype in TYPES
        and filters.dtype == sums_type(x.dtype)
        and (x.is_contiguous() or x.stride()[1:] == (height * width, width, 1))
        and library() is not None
    )


def layer(
    x: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    squeeze: Tensor,
    excite: Tensor,
    gate_bias: Tensor,
    inactive: Tensor,
    filters: Tensor,
    winograd_filters: Tensor,
    bias: Optional[Tensor],
    rectify: bool,
    weight: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    residual: Optional[Tensor] = None,
) -> Tensor:
    """As `layer.plain`, but for some arguments. All but x and the residual, which is of its type, are in `sums_type` of
    x's type, and all but x are contiguous.

    Args:
        excite: [heads, hidden, C].
        filters: of `table`.
        winograd_filters: of `winograd_table`, or empty.
        weight: their shape before, [O, C, kh, kw].
        residual: of the result's shape, added to it before it is rectified.
    """
    shape = _shape(x.shape, len(squeeze), weight, stride, padding, dilation)
    y = _result(x, shape)
    gating = squeeze, excite, gate_bias, squeeze.shape[1], inactive
    winograd = winograd_filters.numel() > 0 and y.shape[2] > 2  # results come by four, one below the other
    filters = winograd_filters if winograd else filters
    _call("layer", x.dtype, shape, x, x.stride(0), *gating, filters, scale, shift, bias, residual, rectify, winograd, y)
    return y


def group_table(weight: Tensor, groups: int) -> Tensor:
    """As `table`, for `group`; filters [O, C / groups, kh, kw]."""
    return table(weight.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1), groups)


def group(
    x: Tensor,
    filters: Tensor,
    bias: Optional[Tensor],
    groups: int,
    weight: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out: Optional[Tensor] = None,
) -> Tensor:
    """An ordinary group convolution; oneDNN's is slow for groups of a few channels.

    Args:
        filters: of `group_table`.
        weight: their shape before, [O, C / groups, kh, kw].
        out: is to be the result, if given; its images may be apart from one another.
    """
    (batch, channels, *sides) = x.shape
    shape = _shape((batch, channels // groups, *sides), groups, weight, stride, padding, dilation)
    y = _result(x, shape) if out is None else out
    _call("group", x.dtype, shape, x, x.stride(0), filters, _summed_with(x, bias), y, y.stride(0))
    return y


def group_backward(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Gradients of an ordinary group convolution for x and weight [O, C / groups, kh, kw]."""
    (batch, channels, *sides) = x.shape
    shape = _shape((batch, channels // groups, *sides), groups, weight.shape, stride, padding, dilation)
    dx, dweight, grad = torch.zeros_like(x), torch.empty_like(weight), grad.contiguous()
    _call("backward_inputs", x.dtype, shape, grad, x, None, group_table(weight, groups), dx, None)
    across = x.new_empty(_call("across", x.dtype, shape))
    _call("backward_filters", x.dtype, shape, grad, x, None, across, dweight)
    return dx, dweight


def stem(
    x: Tensor,
    filters: Tensor,
    bias: Optional[Tensor],
    weight: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """As `dense.stem`; filters of `table`, for one head, and the shape of theirs before."""
    shape = _shape(x.shape, 1, weight, stride, padding, dilation)
    y = x.new_empty(shape[0], shape[3], (shape[5] + 1) // 2, (shape[11] + 1) // 2)
    _call("stem", x.dtype, shape, x, x.stride(0), filters, _summed_with(x, bias), y)
    return y


def packable(weight: Tensor) -> bool:
    """Whether the kernel is there and made for such filters."""
    return weight.device.type == "cpu" and weight.dtype in TYPES and library() is not None


def readable(x: Tensor, packed: Tensor) -> Tensor:
    """x as the kernel reads it, if its filters, packed, are there."""
    return x.contiguous() if packed.numel() and per_sample.is_channels_last(x) else x


def sums_type(dtype: torch.dtype) -> torch.dtype:
    """The type of what is not as large as images."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def table(weight: Tensor, heads: int) -> Tensor:
    """Filters [O, C, kh, kw] as the kernel reads them: what 16 filters have for a tap of a channel lies together."""
    return _table("table", weight, heads, weight.shape)


def winograd_pays(weight: Sequence[int], stride: Pair, dilation: Pair) -> bool:
    """Whether to halve the multiplications of a layer, for twice the room of its filters [O, C, kh, kw]: unless they
    are so many that they come from the memory anew for each image, which takes longer than to multiply."""
    outputs, channels, height, width = weight
    return height == 3 and stride == (1, 1) and dilation[0] == 1 and outputs * channels * width <= 2**18


def winograd_table(weight: Tensor, heads: int) -> Tensor:
    """As `table`, but of what filters [O, C, 3, kw] are at each of the six points of csrc/winograd.h."""
    outputs, channels, _, width = weight.shape
    return _table("winograd_table", weight, heads, (6, outputs, channels, width))


def _table(function: str, weight: Tensor, heads: int, shape: Sequence[int]) -> Tensor:
    filters = torch.empty(shape, dtype=sums_type(weight.dtype))
    outputs, channels, *taps = weight.shape
    axes = [part for tap in taps for part in (1, 1, tap, 1, 0, 1)]
    layer_shape = (ctypes.c_int64 * 16)(1, heads, channels, outputs // heads, *axes)
    _call(function, weight.dtype, layer_shape, weight.contiguous(), filters)
    return filters


def _summed_with(x: Tensor, small: Optional[Tensor]) -> Optional[Tensor]:
    """Gates or a bias, in the type that sums for x have."""
    return None if small is None else small.to(sums_type(x.dtype)).contiguous()


def _result(x: Tensor, shape: ctypes.Array) -> Tensor:
    return x.new_empty(shape[0], shape[1] * shape[3], shape[5], shape[11])


def _shape(
    x: Sequence[int], heads: int, weight: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> ctypes.Array:
    """`Shape` of layout.h."""
    try:
        return _known_shape(x, heads, weight, stride, padding, dilation)
    except TypeError:  # the dispatcher makes lists of tuples
        return _known_shape(x, heads, weight, tuple(stride), tuple(padding), tuple(dilation))


@functools.lru_cache(4096)
def _known_shape(x, heads, weight, stride, padding, dilation):
    out = per_sample.output_shape(x, weight, stride, padding, dilation)
    axes = zip(x[2:], out[2:], weight[2:], stride, padding, dilation)
    numbers = x[0], heads, x[1], weight[0] // heads, *(number for axis in axes for number in axis)
    return (ctypes.c_int64 * 16)(*numbers)


def _call(name: str, dtype: torch.dtype, shape: ctypes.Array, *arguments: Union[Tensor, int, None]) -> int:
    """A function of kernel.cpp; what those return that return nothing means nothing."""
    values = [part.data_ptr() if isinstance(part, Tensor) else part for part in arguments]
    return _function(f"dgc_{name}_{TYPES[dtype]}", len(values))(shape, *values)


@functools.cache
def _function(name: str, arguments: int) -> Callable[..., int]:
    function = getattr(library(), name)
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p] * (1 + arguments)
    return function


@functools.cache
def library() -> Optional[ctypes.CDLL]:
    """The kernel, built if it has not been on this machine; None where it cannot be, which the log says once."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()
        log.warning(
            "The C++ kernel for DGC layers cannot be built (%s): slower formulations take its place. A C++ "
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
    compiling += shlex.split(os.environ.get("CXXFLAGS", ""))
    compiling += [f"-I{torch_folder / 'include'}", "-c", str(KERNEL)]
    if platform.system() == "Linux":
        # Not for linking: the OpenMP that PyTorch has brought along is to be used, threads and all.
        compiling.append("-fopenmp")
    linking = [
        "-shared",
        *shlex.split(os.environ.get("LDFLAGS", "")),
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    sources = b"".join(path.read_bytes() for path in sorted(KERNEL.parent.iterdir()))
    recipe = torch.__version__, compiler, compiling, linking
    key = hashlib.sha256(sources + repr(recipe).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgc_fastai"
    target = folder / f"cpu-{key}.so"
    if not target.exists():
        # Not quite a warning, but those are shown, and a silence of ten seconds asks for a word.
        log.warning("Building the C++ kernel for DGC layers, once, in %s: some ten seconds", folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may build at a time
            run = functools.partial(subprocess.run, cwd=scratch, check=True, capture_output=True, text=True)
            run([compiler, *compiling, "-o", "cpu.o"])
            run([compiler, "cpu.o", *linking, "-o", target.name])
            os.replace(Path(scratch) / target.name, target)
    return target
