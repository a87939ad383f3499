"""A whole DGC layer in inference as one operator, `torch.ops.dgc_fastai.gated_layer`.

Normalization, gates, selection, bias and ReLU cost as much as the convolution of a few channels if each of them is a
call of its own that reads and writes memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import exported
from .conv_desc import ConvDesc
from .dispatch import LayerOperator, conv_flops
from .gates import drop_smallest, head_gates, pool
from .operator import gated_conv2d
from .packed_layer import PackedLayer
from .reference import apply_norm

__all__ = ["gated_layer", "gated_layer_definition"]


def gated_layer(x: Tensor, layer: PackedLayer, residual: Tensor | None = None) -> Tensor:
    """A DGC layer in inference (paper, section 3), by the C++ kernel where it supports the layer.

    Gradients reach x, by way of `gated_layer_definition`.

    Args:
        x: [B, C, H, W].
        layer: its parameters, with gates.
        residual: [B, O, H', W'], for `relu(y + residual)` instead of y.

    Returns:
        y [B, O, H', W'], of the type of x.
    """
    return _operator(x, layer, residual)


def gated_layer_definition(x: Tensor, layer: PackedLayer) -> Tensor:
    """What `gated_layer` computes, step by step: `y = relu(gated_conv2d(u) + bias)` with `u = relu(x * scale + shift)`;
    the normalization, the bias and the ReLU if the layer has them."""
    assert layer.gates is not None
    if layer.scale is not None and layer.shift is not None:
        x = apply_norm(x, layer.scale, layer.shift)
    squeeze, excite, gate_bias, inactive = layer.gates
    gates = drop_smallest(head_gates(pool(x), squeeze, excite, gate_bias), inactive, layer.granularity)
    weight = layer.weight.to(x.dtype)
    y = gated_conv2d(x, gates, weight, None, None, layer.stride, layer.padding, layer.dilation)
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype).reshape(1, -1, 1, 1)
    return F.relu(y) if layer.relu else y


def _flops(desc: ConvDesc, layer: PackedLayer) -> int:
    """The operations that the kept channels need, ties aside; all, where there are only shapes."""
    assert layer.gates is not None
    inactive = layer.gates.inactive
    known = not inactive.is_meta and not isinstance(inactive, torch._subclasses.FakeTensor)
    kept = 1 - int(inactive) / desc.channels if known else 1.0
    return round(conv_flops(desc) * kept)


_operator = LayerOperator("gated_layer", gated_layer_definition, exported.gated_layer, flops=_flops)
