"""A whole DGC layer in inference as one operator, `torch.ops.dgc_fastai.gated_layer`.

Batch norm, ReLU, gates and selection, convolution, bias and ReLU: what a network does around `gated_conv2d` costs more
than a few channels' convolution if each step goes through the memory, and through Python, of its own.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .backends import cpu, exported, per_sample
from .backends.per_sample import Pair
from .gated_conv2d import _library, gated_conv2d, through_dispatcher
from .gates import drop_smallest, head_gates, pool
from .reference import apply_norm

__all__ = ["gated_layer", "pack", "plain"]


def plain(
    x: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    squeeze: Tensor,
    excite: Tensor,
    gate_bias: Tensor,
    inactive: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    rectify: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """The definition, step by step: `relu(gated_conv2d(u) + bias)` with `u = relu(x * scale + shift)`.

    Args:
        x: [B, C, H, W].
        scale, shift: [C] each, a folded batch norm with its ReLU; None where a layer has none.
        squeeze, excite, gate_bias: see `gates.head_gates`.
        inactive: how many channels each head drops; an integer tensor of no dimensions.
        weight: [O, C, kh, kw].
        bias: [O] or None.
        rectify: whether a ReLU follows.

    Returns:
        [B, O, H', W'].
    """
    if scale is not None and shift is not None:
        x = apply_norm(x, scale, shift)
    gates = drop_smallest(head_gates(pool(x), squeeze, excite, gate_bias), inactive)
    y = gated_conv2d(x, gates, weight, None, None, stride, padding, dilation)
    if bias is not None:
        y = y + bias.to(y.dtype).reshape(1, -1, 1, 1)
    return F.relu(y) if rectify else y


def gated_layer(
    x: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    squeeze: Tensor,
    excite: Tensor,
    gate_bias: Tensor,
    inactive: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    rectify: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    packed: tuple[Tensor, Tensor, Tensor],
    kept: int,
    residual: Optional[Tensor] = None,
) -> Tensor:
    """As `plain`, but faster where the C++ kernel takes the layer. Gradients flow by way of `plain`.

    Args:
        packed: of `pack`.
        kept: C - inactive, for exports, which cannot read a tensor.
        residual: [B, O, H', W'], for `relu(y + residual)` instead of the y of `plain`.
    """
    arguments = x, scale, shift, squeeze, excite, gate_bias, inactive, weight, bias, rectify, stride, padding, dilation
    if torch.compiler.is_exporting():
        y = exported.gated_layer(*arguments, kept)
    elif torch.is_grad_enabled() and x.requires_grad:
        y = plain(*arguments)
    elif through_dispatcher():
        y = torch.ops.dgc_fastai.gated_layer(*arguments, *packed)
    else:
        return _layer(*arguments, *packed, residual)
    return y if residual is None else F.relu(y + residual)


def pack(
    weight: Tensor, squeeze: Tensor, excite: Tensor, stride: Pair, dilation: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Filters, the same for Winograd's way if that pays, and `excite`, as the C++ kernel reads them; empty where it
    cannot be used."""
    none = weight.new_empty(0)
    if not cpu.packable(weight):
        return none, none, none
    heads = len(squeeze)
    winograd = cpu.winograd_table(weight, heads) if cpu.winograd_pays(weight.shape, stride, dilation) else none
    return cpu.table(weight, heads), winograd, excite.transpose(1, 2).contiguous()


def _layer(
    x, scale, shift, squeeze, excite, gate_bias, inactive, weight, bias, rectify, stride, padding, dilation,
    filters, winograd_filters, excite_packed, residual=None,
):  # fmt: skip
    x = cpu.readable(x, filters)
    if cpu.takes_layer(x, filters):
        gating = squeeze, excite_packed, gate_bias, inactive
        tables, geometry = (filters, winograd_filters), (weight.shape, stride, padding, dilation)
        if residual is None:
            return cpu.layer(x, scale, shift, *gating, *tables, bias, rectify, *geometry)
        residual = residual.to(x.dtype).contiguous()
        return cpu.layer(x, scale, shift, *gating, *tables, bias, True, *geometry, residual)
    y = plain(x, scale, shift, squeeze, excite, gate_bias, inactive, weight, bias, rectify, stride, padding, dilation)
    return y if residual is None else F.relu(y + residual)


_library.define(
    "gated_layer(Tensor x, Tensor? scale, Tensor? shift, Tensor squeeze, Tensor excite, Tensor gate_bias, "
    "Tensor inactive, Tensor weight, Tensor? bias, bool rectify, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, Tensor filters, Tensor winograd_filters, Tensor excite_packed) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl(_library, "gated_layer", "CompositeExplicitAutograd")(_layer)


@torch.library.register_fake("dgc_fastai::gated_layer", lib=_library)
def _fake(
    x, scale, shift, squeeze, excite, gate_bias, inactive, weight, bias, rectify, stride, padding, dilation, *packed
):
    y = x.new_empty(per_sample.output_shape(x.shape, weight.shape, stride, padding, dilation))
    return y if len(packed[0]) else y.contiguous(memory_format=per_sample.memory_format(x))


@register_flop_formula(torch.ops.dgc_fastai.gated_layer, get_raw=True)
def _flops(x, scale, shift, squeeze, excite, gate_bias, inactive, weight, *args, out_val=None, **kwargs) -> int:
    """The operations that the kept channels need, ties aside; all, where there are only shapes."""
    known = not inactive.is_meta and not isinstance(inactive, torch._subclasses.FakeTensor)
    kept = 1 - int(inactive) / x.shape[1] if known else 1.0
    return round(conv_flop_count(x.shape, weight.shape, out_val.shape) * kept)
