"""`gated_conv2d` with the gates on the filters of each sample instead of on the input of each head.

One convolution for all heads, and for each sample a copy of O x C x kh x kw filters instead of heads x C x H x W
activations; on a CPU a few samples at a time, so that the copies stay in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..conv_desc import ConvDesc
from . import per_sample
from .base import Backend, Gradients, Norm

MAX_VALUES = 2**20  # of the filters of all samples that are computed at a time on a CPU
MAX_VALUES_ON_GPU = 2**28  # as far as memory demands: each part costs launches


class ScaledWeights(Backend):
    name = "scaled_weights"

    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        geometry = desc.stride, desc.padding, desc.dilation
        y = torch.empty(desc.output_shape, dtype=x.dtype, device=x.device, memory_format=per_sample.memory_format(x))
        for part in parts(x, weight):
            per_sample.forward(y[part], x[part], scaled_filters(gates[part], weight, x.dtype), *geometry)
        return y

    def backward(
        self,
        desc: ConvDesc,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        norm: Norm | None = None,
    ) -> Gradients:
        geometry = desc.stride, desc.padding, desc.dilation
        dx, dgates = torch.empty_like(x), torch.empty_like(gates)
        by_head = _by_head(weight, gates)
        dweight = torch.zeros_like(by_head, dtype=gates.dtype)
        for part in parts(x, weight):
            filters = scaled_filters(gates[part], weight, x.dtype)
            dfilters = per_sample.backward(dx[part], grad[part], x[part], filters, *geometry)
            dfilters = dfilters.unflatten(1, by_head.shape[:2])  # [samples, O / heads, heads, C, kh, kw]
            dgates[part] = (dfilters * by_head).sum((1, 4, 5), dtype=gates.dtype)
            dweight += (dfilters * _spread(gates[part])).sum(0, dtype=gates.dtype)
        return Gradients(dx, dgates, dweight.flatten(0, 1).to(weight.dtype))


def parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """The batch, as many samples at a time as are best."""
    most = MAX_VALUES if x.device.type == "cpu" else MAX_VALUES_ON_GPU
    size = max(1, most // weight.numel())
    return (slice(start, start + size) for start in range(0, len(x), size))


def scaled_filters(gates: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, O, C, kh, kw]: every sample's filters."""
    return (_by_head(weight, gates) * _spread(gates)).flatten(1, 2).to(dtype)


def _by_head(weight: Tensor, gates: Tensor) -> Tensor:
    """[O / heads, heads, C, kh, kw]: heads are interleaved."""
    return weight.unflatten(0, (-1, gates.shape[1]))


def _spread(gates: Tensor) -> Tensor:
    """[B, 1, heads, C, 1, 1]"""
    return gates[:, None, :, :, None, None]
