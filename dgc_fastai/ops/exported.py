"""`gated_conv2d` in operators that torch.export and ONNX know, for batches of any size: what an exported network holds."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import per_sample, scaled_inputs, scaled_weights
from .per_sample import Pair


def gated_conv2d(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`, multiplying dropped channels by zero."""
    if per_sample.is_pointwise(weight.shape, padding) and len(weight) < gates.shape[1] * x.shape[2] * x.shape[3]:
        seen = x[:, :, :: stride[0], :: stride[1]]
        filters = scaled_weights.filters(gates, weight, x.dtype).flatten(2)
        return torch.bmm(filters, seen.flatten(2)).unflatten(2, seen.shape[2:])
    return scaled_inputs.forward(x, gates, weight, stride, padding, dilation)


def gathered(
    x: Tensor, gates: Tensor, weight: Tensor, kept: int, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """As `reference.gated_conv2d`, on so many channels for each head and sample, gathered, as matrix products.

    Args:
        kept: no head keeps more channels than that.
    """
    batch, heads, channels = gates.shape
    if kept < channels:  # the next smaller gate is the threshold, and ties with it are dropped
        values, places = gates.topk(kept + 1, dim=-1)
        values, threshold, places = values[..., :kept], values[..., kept:], places[..., :kept]
        values = values * (values > threshold)
    else:
        values, places = gates, torch.arange(channels, device=x.device).expand(gates.shape)
    rows = places + channels * torch.arange(batch, device=x.device).view(-1, 1, 1)
    inputs = x.flatten(0, 1).index_select(0, rows.flatten()).view(-1, kept, *x.shape[2:])
    table = weight.unflatten(0, (-1, heads)).permute(1, 2, 3, 4, 0).flatten(0, 1)  # [heads x C, kh, kw, O / heads]
    rows = places + channels * torch.arange(heads, device=x.device).view(1, -1, 1)
    filters = table.index_select(0, rows.flatten()).view(-1, kept, *table.shape[1:])
    filters = filters * values.to(x.dtype).view(-1, kept, 1, 1, 1)
    size = per_sample.output_shape(x.shape, weight.shape, stride, padding, dilation)[2:]
    inputs = F.pad(inputs, (padding[1], padding[1], padding[0], padding[0]))
    seen = []
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            top, left = row * dilation[0], column * dilation[1]
            bottom, right = top + (size[0] - 1) * stride[0] + 1, left + (size[1] - 1) * stride[1] + 1
            seen.append(inputs[:, :, top : bottom : stride[0], left : right : stride[1]])
    pixels = torch.stack(seen, 2).flatten(1, 2).flatten(2)  # [B x heads, kept x kh x kw, H' x W']
    y = torch.bmm(filters.flatten(1, 3).transpose(1, 2), pixels)
    return y.view(-1, heads, y.shape[1], *size).transpose(1, 2).flatten(1, 2)
