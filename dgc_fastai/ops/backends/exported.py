"""A layer in operators that torch.export and ONNX know, for batches of any size: what an exported network holds."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gates import drop_smallest, head_gates, pool
from . import per_sample, scaled_inputs, scaled_weights
from .per_sample import Pair


def gated_conv2d(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`, multiplying dropped channels by zero."""
    seen = x[:, :, :: stride[0], :: stride[1]]
    if per_sample.is_pointwise(weight.shape, padding) and len(weight) < gates.shape[1] * seen.shape[2] * seen.shape[3]:
        filters = scaled_weights.filters(gates, weight, x.dtype).flatten(2)
        return torch.bmm(filters, seen.flatten(2)).unflatten(2, seen.shape[2:])
    return scaled_inputs.forward(x, gates, weight, stride, padding, dilation)


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
    kept: int,
) -> Tensor:
    """As `layer.plain`. 1x1 filters meet kept channels only.

    Larger ones would need the pixels that they see copied for each tap: twice as slow, as measured with onnxruntime, as
    multiplying dropped channels by zero.

    Args:
        kept: how many channels a head keeps; ties at the threshold are dropped besides.
    """
    if scale is not None:
        # One operator, where a product and a sum would be two.
        x = F.relu(F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0))
    gates = head_gates(pool(x), squeeze, excite, gate_bias)
    if per_sample.is_pointwise(weight.shape, padding) and kept + 1 < x.shape[1]:
        y = _gathered(x[:, :, :: stride[0], :: stride[1]], gates, weight, kept)
    else:
        y = gated_conv2d(x, drop_smallest(gates, inactive), weight, stride, padding, dilation)
    if bias is not None:
        y = y + bias.to(y.dtype).reshape(1, -1, 1, 1)
    return F.relu(y) if rectify else y


def _gathered(x: Tensor, gates: Tensor, weight: Tensor, kept: int) -> Tensor:
    batch, heads, channels = gates.shape
    values, places = gates.topk(kept + 1, dim=-1, sorted=False)  # and the threshold, which is not above itself
    values = values * (values > values.amin(-1, keepdim=True))
    rows = places + channels * torch.arange(batch, device=x.device).view(-1, 1, 1)
    pixels = x.flatten(0, 1).flatten(1).index_select(0, rows.flatten()).view(-1, kept + 1, x.shape[2] * x.shape[3])
    table = weight.flatten(1).unflatten(0, (-1, heads)).permute(1, 2, 0).flatten(0, 1)  # [heads x C, O / heads]
    rows = places + channels * torch.arange(heads, device=x.device).view(1, -1, 1)
    filters = table.index_select(0, rows.flatten()).view(-1, kept + 1, table.shape[1])
    y = torch.bmm((filters * values.to(x.dtype).view(-1, kept + 1, 1)).transpose(1, 2), pixels)
    return y.view(-1, heads, table.shape[1], *x.shape[2:]).transpose(1, 2).flatten(1, 2)
