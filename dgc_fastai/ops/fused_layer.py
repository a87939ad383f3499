"""A DGC layer on a GPU: pooling, gates, selection and, if the backend wants it, the normalization by a few Triton
kernels (backends/triton_layer.py), the convolution by the backend that is selected.

`gates` defines in plain PyTorch what the kernels compute, and computes it elsewhere. torch.compile is given that, too,
since it fuses it by itself.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode

from . import operator
from .backends.base import Norm
from .backends.per_sample import memory_format
from .conv_desc import Pair, conv_desc
from .selection import uses_reference, uses_triton

__all__ = ["Geometry", "folds_norm", "fused_layer", "is_supported"]


class Geometry(NamedTuple):
    """Of the convolution."""

    stride: Pair
    padding: Pair
    dilation: Pair


def is_supported(x: Tensor, squeeze: Tensor) -> bool:
    """Whether `fused_layer` can compute a layer with this input [B, C, H, W] and these gates [heads, hidden, C] here.
    Not where a tracer, a transform or `FlopCounterMode` wants to see operators."""
    return (
        not torch.compiler.is_compiling()  # first, since torch.compile cannot trace the rest
        and not torch.jit.is_tracing()
        and x.numel() > 0
        and not uses_reference()
        and torch._C._functorch.peek_interpreter_stack() is None
        and uses_triton(x)
        and squeeze.shape[2] <= _kernels().MAX_CHANNELS
        and not any(isinstance(mode, _FlopCounterMode) for mode in _get_current_dispatch_mode_stack())
    )


def folds_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether `fused_layer` can normalize x as this module does."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.running_mean is not None
        and norm.momentum is not None
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        and (not norm.training or x.numel() > x.shape[1])  # PyTorch's has an error message for one value
    )


def fused_layer(
    x: Tensor,
    weight: Tensor,
    squeeze: Tensor,
    excite: Tensor,
    bias: Tensor,
    inactive: Tensor,
    norm: nn.BatchNorm2d | None,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates from the pooled features, selection and convolution; see `gates` and `reference`. Autograd keeps x and
    nothing as large. Under autocast x is cast. The weight follows x; everything else is float32.

    Args:
        x: [B, C, H, W].
        weight: filters [O, C, kh, kw].
        squeeze, excite, bias: of the gates, see `gates.head_gates`.
        inactive: how many channels each head drops, an integer tensor of no dimensions.
        norm: normalizes x before a ReLU, see `folds_norm`; in training its running statistics move. None if x is as it
            is to be pooled and convolved.

    Returns:
        y [B, O, H', W']; what sums up to the layer's penalty [B, heads]; the kept gates [B, heads, C], without a
        gradient.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    about = None
    if norm is not None:
        tracked = norm.num_batches_tracked if norm.training else None
        running = norm.running_mean, norm.running_var
        about = _kernels().Norm(norm.weight, norm.bias, *running, tracked, norm.momentum, norm.eps, norm.training)
    weight = weight.contiguous(memory_format=memory_format(weight))
    weights = squeeze, excite, bias, *(about or (None, None))[:2]
    return _FusedLayer.apply(x, weight, *weights, about, inactive, geometry)


class _FusedLayer(torch.autograd.Function):
    """norm_weight and norm_bias are those of `norm`, once more for autograd to see."""

    @staticmethod
    def forward(ctx: Any, x, weight, squeeze, excite, bias, norm_weight, norm_bias, norm, inactive, geometry):
        kernels = _kernels()
        x, filters = x.contiguous(memory_format=memory_format(x)), weight.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            selected = kernels.select(x, kernels.Gates(squeeze, excite, bias), inactive, norm)
            y = operator.forward(x, selected.gates, filters, _folded(norm, selected), *geometry)
        ctx.save_for_backward(x, weight, filters, squeeze, excite, bias, *selected)
        ctx.norm, ctx.geometry = norm, geometry
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(selected.gates)
        return y, selected.penalty, selected.gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dpenalty, _):
        kernels = _kernels()
        x, weight, filters, squeeze, excite, bias, *selected = ctx.saved_tensors
        selected, weights = kernels.Selected(*selected), kernels.Gates(squeeze, excite, bias)
        if dy is None:  # nobody uses the output
            shape = conv_desc(x.shape, weight.shape, len(squeeze), *ctx.geometry).output_shape
            dy = x.new_zeros(shape)
        norm = _folded(ctx.norm, selected)
        dx, dgates, dweight, *of_norm = operator.backward(dy, x, selected.gates, filters, norm, *ctx.geometry)
        upstream = kernels.Upstream(dx, dweight, dgates, *(of_norm if norm else (None, None)), dpenalty)
        dx, dweight, dgates, dnorm = kernels.backward(x, weight, weights, ctx.norm, selected, upstream)
        return dx, dweight, *dgates, *(dnorm or (None, None)), None, None, None


def _folded(norm: Any, selected: Any) -> Norm | None:
    return None if norm is None else Norm(*selected.folded[:2].unbind())


def _kernels() -> Any:
    from .backends import triton_layer

    return triton_layer
