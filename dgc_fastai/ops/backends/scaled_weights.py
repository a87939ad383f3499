"""`gated_conv2d` with the gates on the filters of each sample instead of on the input of each head.

One convolution for all heads, and a copy of O x C x kh x kw filters for each sample instead of heads x C x H x W
activations; a few samples at a time, so that the copies stay in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import per_sample
from .per_sample import Pair

MOST = 2**20  # values of the filters of the samples that are computed at a time


def forward(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`."""
    shape = per_sample.output_shape(x.shape, weight.shape, stride, padding, dilation)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=per_sample.memory_format(x))
    for part in _parts(x, weight):
        per_sample.forward(y[part], x[part], filters(gates[part], weight, x.dtype), stride, padding, dilation)
    return y


def backward(
    grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, gates and weight."""
    dx, dgates = torch.empty_like(x), torch.empty_like(gates)
    by_head = _by_head(weight, gates)
    dweight = torch.zeros_like(by_head, dtype=gates.dtype)
    for part in _parts(x, weight):
        scaled = filters(gates[part], weight, x.dtype)
        dfilters = per_sample.backward(dx[part], grad[part], x[part], scaled, stride, padding, dilation)
        dfilters = dfilters.unflatten(1, by_head.shape[:2])  # [samples, O / heads, heads, C, kh, kw]
        dgates[part] = (dfilters * by_head).sum((1, 4, 5), dtype=gates.dtype)
        dweight += (dfilters * _spread(gates[part])).sum(0, dtype=gates.dtype)
    return dx, dgates, dweight.flatten(0, 1).to(weight.dtype)


def _parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """The batch, a few samples at a time."""
    size = max(1, MOST // weight.numel())
    return (slice(start, start + size) for start in range(0, len(x), size))


def filters(gates: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, O, C, kh, kw]: every sample's filters."""
    return (_by_head(weight, gates) * _spread(gates)).flatten(1, 2).to(dtype)


def _by_head(weight: Tensor, gates: Tensor) -> Tensor:
    """[O / heads, heads, C, kh, kw]: heads are interleaved."""
    return weight.unflatten(0, (-1, gates.shape[1]))


def _spread(gates: Tensor) -> Tensor:
    """[B, 1, heads, C, 1, 1]"""
    return gates[:, None, :, :, None, None]
