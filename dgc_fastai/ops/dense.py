"""Convolutions without gates where the C++ kernel is faster than oneDNN: in groups of a few channels, and in inference
in the stem of a network, of which only what has been pooled goes through the memory."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .backends import cpu, per_sample
from .backends.per_sample import Pair
from .gated_conv2d import _library, forced, through_dispatcher

__all__ = ["STEM_CHANNELS", "TrainedGroupConv", "group_conv2d", "pack_groups", "stem", "trains_group_conv"]

STEM_CHANNELS = 4  # of images; for more of them oneDNN is the faster one
GROUP_CHANNELS = 32  # of a group in training, likewise


def group_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    groups: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    packed: Tensor,
    out: Optional[Tensor] = None,
) -> Tensor:
    """An ordinary group convolution by the C++ kernel, where it takes it.

    Args:
        packed: of `pack_groups`.
        out: is to be the result, if given.
    """
    if torch.compiler.is_exporting() or (torch.is_grad_enabled() and x.requires_grad):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if through_dispatcher():
        y = torch.ops.dgc_fastai.group_conv2d(x, weight, bias, groups, stride, padding, dilation, packed)
        return y if out is None else out.copy_(y)
    return _group_conv2d(x, weight, bias, groups, stride, padding, dilation, packed, out)


def trains_group_conv(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether `TrainedGroupConv` is there and the faster one; not where somebody wants to see PyTorch's operator, or to
    have its second derivatives."""
    return (
        not through_dispatcher()  # first, since torch.compile cannot look into the rest
        and 1 < groups
        and weight.shape[1] <= GROUP_CHANNELS
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and x.dtype in (torch.float32, torch.float64)
        and cpu.takes(x, weight)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and forced() != "reference"
    )


class TrainedGroupConv(torch.autograd.Function):
    """An ordinary group convolution by the C++ kernel, and its gradients: `apply(x, weight, groups, stride, padding,
    dilation)` with x [B, C, H, W] and weight [O, C / groups, kh, kw]."""

    @staticmethod
    def forward(ctx, x, weight, groups, *geometry):
        ctx.save_for_backward(x, weight)
        ctx.arguments = groups, *geometry
        return cpu.group(x, cpu.group_table(weight, groups), None, groups, weight.shape, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *cpu.group_backward(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


def stem(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], stride: Pair, padding: Pair, dilation: Pair, packed: Tensor
) -> Tensor:
    """`max_pool2d(relu(conv2d(x, weight, bias)), 3, stride=2, padding=1)`: [B, C, H, W] -> [B, O, H', W'].

    Args:
        packed: of `pack_groups`, with one group.
    """
    if torch.compiler.is_exporting() or (torch.is_grad_enabled() and x.requires_grad):
        return _plain_stem(x, weight, bias, stride, padding, dilation)
    if through_dispatcher():
        return torch.ops.dgc_fastai.stem(x, weight, bias, stride, padding, dilation, packed)
    return _stem(x, weight, bias, stride, padding, dilation, packed)


def pack_groups(weight: Tensor, groups: int) -> Tensor:
    """Filters of a group convolution as the C++ kernel reads them; empty where it cannot be used."""
    return cpu.group_table(weight, groups) if cpu.packable(weight) else weight.new_empty(0)


def _group_conv2d(x, weight, bias, groups, stride, padding, dilation, packed, out=None):
    x = cpu.readable(x, packed)
    if cpu.takes_layer(x, packed):
        return cpu.group(x, packed, bias, groups, weight.shape, stride, padding, dilation, out)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y if out is None else out.copy_(y)


def _stem(x, weight, bias, stride, padding, dilation, packed):
    x = cpu.readable(x, packed)
    if cpu.takes_layer(x, packed):
        return cpu.stem(x, packed, bias, weight.shape, stride, padding, dilation)
    return _plain_stem(x, weight, bias, stride, padding, dilation)


def _plain_stem(x, weight, bias, stride, padding, dilation):
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, stride, padding, dilation)), 3, 2, 1)


for _schema, _implementation in (
    ("group_conv2d(Tensor x, Tensor weight, Tensor? bias, int groups, {}", _group_conv2d),
    ("stem(Tensor x, Tensor weight, Tensor? bias, {}", _stem),
):
    _geometry = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, Tensor packed) -> Tensor"
    _library.define(_schema.format(_geometry), tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_library, _schema.partition("(")[0], "CompositeExplicitAutograd")(_implementation)


@torch.library.register_fake("dgc_fastai::group_conv2d", lib=_library)
def _group_fake(x, weight, bias, groups, stride, padding, dilation, packed):
    return _fake(x, packed, per_sample.output_shape(x.shape, weight.shape, stride, padding, dilation))


@torch.library.register_fake("dgc_fastai::stem", lib=_library)
def _stem_fake(x, weight, bias, stride, padding, dilation, packed):
    batch, filters, height, width = per_sample.output_shape(x.shape, weight.shape, stride, padding, dilation)
    return _fake(x, packed, (batch, filters, (height + 1) // 2, (width + 1) // 2))


def _fake(x, packed, shape):
    y = x.new_empty(shape)
    return y if len(packed) else y.contiguous(memory_format=per_sample.memory_format(x))


@register_flop_formula(torch.ops.dgc_fastai.group_conv2d, get_raw=True)
def _group_flops(x, weight, *args, out_val=None, **kwargs) -> int:
    return conv_flop_count(x.shape, weight.shape, out_val.shape)


@register_flop_formula(torch.ops.dgc_fastai.stem, get_raw=True)
def _stem_flops(x, weight, bias, *geometry_and_packed, **kwargs) -> int:
    out = per_sample.output_shape(x.shape, weight.shape, *geometry_and_packed[:3])
    return conv_flop_count(x.shape, weight.shape, out)
