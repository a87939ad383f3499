"""A layer in operators that torch.export and ONNX know, for batches of any size: what exported networks consist of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_desc import Pair
from ..gates import drop_smallest, head_gates, pool, spread_blocks
from ..packed_layer import PackedLayer
from . import per_sample
from .scaled_inputs import scaled_inputs
from .scaled_weights import scaled_filters


def gated_conv2d(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`, multiplying dropped channels by zero."""
    read = x[:, :, :: stride[0], :: stride[1]]
    if per_sample.is_pointwise(weight.shape, padding) and len(weight) < gates.shape[1] * read.shape[2] * read.shape[3]:
        filters = scaled_filters(gates, weight, x.dtype).flatten(2)
        return torch.bmm(filters, read.flatten(2)).unflatten(2, read.shape[2:])
    return scaled_inputs(x, gates, weight, stride, padding, dilation)


def gated_layer(x: Tensor, layer: PackedLayer) -> Tensor:
    """As `layer.gated_layer_definition`. 1x1 filters are multiplied with kept channels only.

    Larger ones would need the pixels that they read copied for each tap: twice as slow, as measured with onnxruntime,
    as multiplying dropped channels by zero.
    """
    assert layer.gates is not None
    if layer.scale is not None and layer.shift is not None:
        # One operator, where a product and a sum would be two.
        mean, var = torch.zeros_like(layer.scale), torch.ones_like(layer.scale)
        x = F.relu(F.batch_norm(x, mean, var, layer.scale, layer.shift, eps=0.0))
    squeeze, excite, gate_bias, inactive = layer.gates
    gates = head_gates(pool(x), squeeze, excite, gate_bias)
    if (
        per_sample.is_pointwise(layer.weight_shape, layer.padding)
        and layer.kept is not None
        and layer.kept + 1 < gates.shape[2]
    ):
        y = _gathered(x[:, :, :: layer.stride[0], :: layer.stride[1]], gates, layer.weight, layer.kept)
    else:
        gates = spread_blocks(drop_smallest(gates, inactive, layer.granularity), x.shape[1])
        y = gated_conv2d(x, gates, layer.weight, layer.stride, layer.padding, layer.dilation)
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype).reshape(1, -1, 1, 1)
    return F.relu(y) if layer.relu else y


def _gathered(x: Tensor, gates: Tensor, weight: Tensor, kept: int) -> Tensor:
    """The product with the channels of the `kept` largest gates [B, heads, G], each of C / G neighboring channels; ties
    with the threshold are dropped besides."""
    batch, heads, blocks = gates.shape
    size, area = x.shape[1] // blocks, x.shape[2] * x.shape[3]
    channels = (kept + 1) * size
    values, places = gates.topk(kept + 1, dim=-1, sorted=False)  # and the threshold, which is not above itself
    values = values * (values > values.amin(-1, keepdim=True))
    rows = places + blocks * torch.arange(batch, device=x.device).view(-1, 1, 1)
    pixels = x.reshape(-1, size * area).index_select(0, rows.flatten()).view(-1, channels, area)
    by_head = weight.flatten(1).unflatten(0, (-1, heads)).permute(1, 2, 0)  # [heads, C, O / heads]
    rows = places + blocks * torch.arange(heads, device=x.device).view(1, -1, 1)
    filters = by_head.reshape(heads * blocks, -1).index_select(0, rows.flatten()).view(-1, channels, by_head.shape[2])
    scale = spread_blocks(values.to(x.dtype), channels).reshape(-1, channels, 1)
    y = torch.bmm((filters * scale).transpose(1, 2), pixels)
    return y.view(-1, heads, by_head.shape[2], *x.shape[2:]).transpose(1, 2).flatten(1, 2)
