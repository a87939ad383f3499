"""Convolutions without gates where the C++ kernel is faster than oneDNN: groups of a few channels, and in inference the
stem of a network, whose outputs reach memory only after they have been pooled."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import cpu
from .conv_desc import conv_desc
from .dispatch import LayerOperator, through_dispatcher
from .packed_layer import PackedLayer
from .selection import uses_reference

__all__ = ["MAX_STEM_CHANNELS", "TrainedGroupConv", "group_conv2d", "stem", "trains_group_conv"]

MAX_STEM_CHANNELS = 4  # of images; oneDNN is faster for more
MAX_GROUP_CHANNELS = 32  # of a group in training; likewise


def group_conv2d(x: Tensor, layer: PackedLayer, out: Tensor | None = None) -> Tensor:
    """An ordinary group convolution in inference, by the C++ kernel where it supports the layer.

    Args:
        x: [B, C, H, W].
        layer: its parameters, without gates, norm or ReLU.
        out: the tensor to write into, [B, O, H', W'].

    Returns:
        [B, O, H', W'], of the type of x.
    """
    return _group_conv2d(x, layer, None, out)


def stem(x: Tensor, layer: PackedLayer) -> Tensor:
    """`max_pool2d(relu(conv2d(x)), 3, stride=2, padding=1)` in inference: [B, C, H, W] -> [B, O, H', W'].

    Args:
        layer: the parameters of the convolution, with one head and no gates.
    """
    return _stem(x, layer)


def trains_group_conv(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether `TrainedGroupConv` supports a convolution and is the faster one. Not where a tracer, a mode or autocast
    wants to see PyTorch's operator, nor where its second derivatives may be needed."""
    return (
        not through_dispatcher()  # first, since torch.compile cannot trace the rest
        and groups > 1
        and weight.shape[1] <= MAX_GROUP_CHANNELS
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
        and cpu.is_supported(x, weight)
        and torch._C._functorch.peek_interpreter_stack() is None
        and not uses_reference()
    )


class TrainedGroupConv(torch.autograd.Function):
    """An ordinary group convolution by the C++ kernel, with its gradients: `apply(x, weight, groups, stride, padding,
    dilation)` with contiguous x [B, C, H, W] and weight [O, C / groups, kh, kw]."""

    @staticmethod
    def forward(ctx, x, weight, groups, stride, padding, dilation):
        ctx.save_for_backward(x, weight)
        ctx.desc = conv_desc(x.shape, weight.shape, groups, stride, padding, dilation, True)
        return cpu.group_conv2d(ctx.desc, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *cpu.group_conv2d_backward(ctx.desc, grad, *ctx.saved_tensors), None, None, None, None


def _group_conv2d_definition(x: Tensor, layer: PackedLayer) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.conv2d(x, layer.weight.to(x.dtype), bias, layer.stride, layer.padding, layer.dilation, layer.heads)


def _stem_definition(x: Tensor, layer: PackedLayer) -> Tensor:
    return F.max_pool2d(F.relu(_group_conv2d_definition(x, layer)), 3, 2, 1)


_group_conv2d = LayerOperator("group_conv2d", _group_conv2d_definition)
_stem = LayerOperator(
    "stem",
    _stem_definition,
    output_shape=lambda desc: (*desc.output_shape[:2], *((size + 1) // 2 for size in desc.out_size)),
)
