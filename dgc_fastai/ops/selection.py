"""Which backend computes `gated_conv2d`. What `use_backend` forces is read here and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .backends.base import Backend
from .backends.cpu import Cpu
from .backends.cudnn import CuDNN
from .backends.gathered import CHANNEL_MULTIPLE, Gathered, max_kept
from .backends.reference import Reference
from .backends.scaled_inputs import ScaledInputs
from .backends.scaled_weights import ScaledWeights
from .backends.triton import Triton, TritonSkipping
from .conv_desc import ConvDesc, Pair, conv_desc
from .measured import faster
from .triton_trial import triton_works

__all__ = [
    "BACKENDS",
    "fastest_backend",
    "fuses_norm",
    "select_backend",
    "use_backend",
    "uses_reference",
    "uses_triton",
]

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Reference(),
        ScaledWeights(),
        ScaledInputs(),
        Gathered(),
        Cpu(),
        CuDNN(),
        Triton(),
        TritonSkipping(),
    )
}

_forced: Backend | None = None


@contextmanager
def use_backend(backend: str | Backend | None) -> Iterator[None]:
    """Within this context, compute every `gated_conv2d` by one backend, forward and backward.

    Args:
        backend: one of `BACKENDS`, by name, or any other; None for the fastest one. Layers that it does not support are
            computed as with None.

    Raises:
        ValueError: there is no backend of this name.
    """
    global _forced
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
        backend = BACKENDS[backend]
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def uses_reference() -> bool:
    """Whether the definition is forced, which autograd differentiates, instead of the operator."""
    return _forced is not None and _forced.name == "reference"


def uses_triton(x: Tensor) -> bool:
    """Whether Triton kernels may compute with x: on a GPU, and in Triton's interpreter if the backend is forced."""
    return (x.is_cuda or (_forced is not None and _forced.uses_triton)) and triton_works(x)


def fuses_norm(x: Tensor, weight: Tensor, heads: int, stride: Pair, padding: Pair, dilation: Pair) -> bool:
    """Whether the backend that will be selected applies normalization and ReLU where it reads the input, and so should
    be given both.

    Args:
        x: [B, C, H, W], before the normalization.
        weight: [O, C, kh, kw]; both as the layer has them, whatever autocast makes of them.
    """
    if _forced is not None:
        return _forced.fuses_norm
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cuda")
        # What they hold does not matter, and to cast them would be a kernel for each layer.
        x, weight = (one if one.dtype == dtype else torch.empty_like(one, dtype=dtype) for one in (x, weight))
    desc = conv_desc(x.shape, weight.shape, heads, stride, padding, dilation)
    return _fastest_on_gpu(desc, x, weight, True).fuses_norm


def select_backend(desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, fused: bool = False) -> Backend:
    """The backend for a layer: the forced one if it supports the layer, otherwise the fastest.

    Args:
        fused: whether the layer's normalization and ReLU are left to the operator; see `fuses_norm`.
    """
    if _forced is not None and _forced.is_supported(desc, x, weight):
        return _forced
    if x.device.type == "cuda":
        return _fastest_on_gpu(desc, x, weight, fused)
    # To count what is kept would stall a GPU.
    kept = max_kept(gates) if x.device.type == "cpu" else None
    has_kernel = BACKENDS["cpu"].is_supported(desc, x, weight)
    return BACKENDS[fastest_backend(desc, kept, x.device.type, has_kernel)]


def _fastest_on_gpu(desc: ConvDesc, x: Tensor, weight: Tensor, fused: bool) -> Backend:
    """cuDNN, unless the Triton kernels were measured to be faster."""
    plain, triton = BACKENDS["cudnn"], BACKENDS["triton"]
    if not plain.is_supported(desc, x, weight):
        plain = BACKENDS[fastest_backend(desc, None, "cuda")]
    return faster(plain, triton, desc, x, weight, fused) if triton.is_supported(desc, x, weight) else plain


def fastest_backend(desc: ConvDesc, kept: int | None, device: str = "cpu", has_kernel: bool = False) -> str:
    """The name of the backend that is expected to be the fastest of those that need no measurement.

    Args:
        kept: the largest number of channels that any head keeps, None if it is not known.
        device: the type of the device.
        has_kernel: whether "cpu" supports the layer.
    """
    channels, filters, taps = desc.channels, desc.filters, desc.kernel_size[0] * desc.kernel_size[1]
    area = desc.in_size[0] * desc.in_size[1]
    out_area = area // (desc.stride[0] * desc.stride[1])
    if desc.is_pointwise:
        area = out_area  # all that is read
    elif device != "cpu":
        # Filters for each sample make a group convolution of as many groups, which cuDNN is slow at.
        return "scaled_inputs"

    # The C++ kernel skips dropped channels, at as many multiplications per second as oneDNN's convolutions. MKL's
    # matrix products, which 1x1 filters amount to, reach about twice as many, but compute with dropped channels, too.
    if has_kernel and (not desc.is_pointwise or (kept is not None and kept < 0.55 * channels)):
        return "cpu"
    # Gathering saves the multiplications with dropped channels and costs copies. As measured on CPUs, fetching a pixel
    # of a channel and adding its gradient back costs as much as some 32 multiplications. So does a value of a filter,
    # or 64 where oneDNN reorders it. A fifth should be saved for gathering to be worth it.
    if kept is not None and (desc.is_pointwise or (desc.stride == (1, 1) and filters % 8 == 0)):
        work = filters * taps
        padded = kept if desc.is_pointwise else -(-kept // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        gathering = padded * (work * (out_area + (32 if desc.is_pointwise else 64)) + 32 * area)
        if gathering < 0.8 * channels * work * out_area:
            return "gathered"
    # The smaller one is to be scaled: filters [O, C, kh, kw] or inputs [heads, C, H, W] of each sample, by head.
    return "scaled_weights" if filters * taps < out_area else "scaled_inputs"
