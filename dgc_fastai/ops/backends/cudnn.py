"""`gated_conv2d` by cuDNN's convolutions and cuBLAS's products, with Triton kernels for the passes around them.

1x1 filters are scaled for each sample, where these are smaller than the output: one product for all heads. Otherwise
each head has a convolution of its own with a scaled copy of the input. Backward, both are made again. What is written
is what cuDNN reads: norm, ReLU and gates are applied on the way, and every head's gradient is read once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_desc import ConvDesc
from ..precision import products_like_convolutions
from ..triton_trial import triton_works
from . import per_sample
from .base import Backend, Gradients, Norm
from .scaled_weights import parts

__all__ = ["CuDNN"]


class CuDNN(Backend):
    name = "cudnn"
    fuses_norm = True
    uses_triton = True

    def is_supported(self, desc: ConvDesc, x: Tensor, weight: Tensor) -> bool:
        return x.numel() > 0 and triton_works(x)

    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        x, gates = _laid_out(x), gates.contiguous()
        with products_like_convolutions(x):
            return (_products if _scales_filters(desc) else _convolutions)(desc, x, gates, weight, norm)

    def backward(
        self,
        desc: ConvDesc,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        norm: Norm | None = None,
    ) -> Gradients:
        x, gates = _laid_out(x), gates.contiguous()
        grad = grad.contiguous(memory_format=per_sample.memory_format(x))
        with products_like_convolutions(x):
            backward = _products_backward if _scales_filters(desc) else _convolutions_backward
            return backward(desc, grad, x, gates, weight, norm)


def _scales_filters(desc: ConvDesc) -> bool:
    return desc.is_pointwise and desc.filters < desc.out_size[0] * desc.out_size[1]


def _convolutions(desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None) -> Tensor:
    geometry = desc.stride, desc.padding, desc.dilation
    inputs = _passes().scale(x, norm, gates)
    filters = _by_head(weight, 0, desc.heads, per_sample.is_channels_last(x))
    outputs = [F.conv2d(one, of_head, None, *geometry) for one, of_head in zip(inputs, filters)]
    return _interleaved(outputs, 1, per_sample.is_channels_last(x))


def _convolutions_backward(
    desc: ConvDesc, grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None
) -> Gradients:
    geometry, last = (desc.stride, desc.padding, desc.dilation), per_sample.is_channels_last(x)
    inputs = list(_passes().scale(x, norm, gates))
    dinputs, dfilters = [], []
    for part, filters in zip(_by_head(grad, 1, desc.heads, last), _by_head(weight, 0, desc.heads, last)):
        dinput, dfilter = per_sample.conv2d_backward(part, inputs.pop(0), filters, *geometry)
        dinputs.append(dinput.contiguous(memory_format=per_sample.memory_format(x)))
        dfilters.append(dfilter)
    dx, dgates, dscale, dshift = _passes().combine(x, norm, gates, dinputs)
    assert dgates is not None
    return Gradients(dx, dgates, _interleaved(dfilters, 0, per_sample.is_channels_last(weight)), dscale, dshift)


def _products(desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None) -> Tensor:
    u = x if norm is None else _passes().scale(x, norm, None)
    y = torch.empty(desc.output_shape, dtype=x.dtype, device=x.device, memory_format=per_sample.memory_format(x))
    for part in parts(x, weight):
        filters = _scaled_filters(gates[part], weight, x.dtype)
        per_sample.forward(y[part], u[part], filters, desc.stride, desc.padding, desc.dilation)
    return y


def _products_backward(
    desc: ConvDesc, grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None
) -> Gradients:
    u = x if norm is None else _passes().scale(x, norm, None)
    du, found = torch.empty_like(x), []
    for part in parts(x, weight):
        filters = _scaled_filters(gates[part], weight, x.dtype)
        geometry = desc.stride, desc.padding, desc.dilation
        dfilters = per_sample.backward(du[part], grad[part], u[part], filters, *geometry)
        found.append(_passes().filter_gradients(dfilters, weight, gates[part]))
    dgates, dweight = found[0]
    if len(found) > 1:
        dgates = torch.cat([of_gates for of_gates, _ in found])
        dweight = torch.stack([of_weight for _, of_weight in found]).sum(0, dtype=gates.dtype).to(weight.dtype)
    if norm is None:
        return Gradients(du, dgates, dweight)
    dx, _, dscale, dshift = _passes().combine(x, norm, None, [du])
    return Gradients(dx, dgates, dweight, dscale, dshift)


def _by_head(tensor: Tensor, dimension: int, heads: int, last: bool) -> Tensor:
    """The heads' parts [heads, ...] of filters [O, C, kh, kw] or outputs [B, O, H', W'], by one copy; each is
    channels-last or contiguous."""
    parts = tensor.unflatten(dimension, (-1, heads)).movedim(dimension + 1, 0)
    if not last:
        return parts.contiguous()
    return parts.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _interleaved(parts: list[Tensor], dimension: int, last: bool) -> Tensor:
    """The inverse of `_by_head`."""
    if not last:
        return torch.stack(parts, dimension + 1).flatten(dimension, dimension + 1)
    parts = [part.permute(0, 2, 3, 1) for part in parts]
    axis = 1 if dimension == 0 else 4
    return torch.stack(parts, axis).flatten(axis - 1, axis).permute(0, 3, 1, 2)


def _scaled_filters(gates: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, O, C, 1, 1], multiplied in float32 and written once."""
    by_head = weight.unflatten(0, (-1, gates.shape[1]))
    filters = torch.empty((len(gates), *by_head.shape), dtype=dtype, device=weight.device)
    return torch.mul(by_head, gates[:, None, :, :, None, None], out=filters).flatten(1, 2)


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=per_sample.memory_format(x))


def _passes() -> Any:
    from . import triton_passes

    return triton_passes
