"""`gated_conv2d` one head after the other, each from a scaled input that is gone when the next one's turn comes.

The backward pass scales the input again, so that nothing as large as heads x C x H x W is ever kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .per_sample import Pair, conv2d_backward


def forward(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`."""
    heads = gates.shape[1]
    parts = [
        F.conv2d(x * _scale(gates, head, x), weight[head::heads], None, stride, padding, dilation)
        for head in range(heads)
    ]
    return torch.stack(parts, 2).flatten(1, 2)


def backward(
    grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, gates and weight."""
    heads = gates.shape[1]
    dx, dgates, dweight = torch.zeros_like(x), torch.empty_like(gates), torch.empty_like(weight)
    for head in range(heads):
        scale = _scale(gates, head, x)
        filters = weight[head::heads]
        part = grad[:, head::heads].contiguous()
        dscaled, dfilters = conv2d_backward(part, x * scale, filters, stride, padding, dilation)
        dweight[head::heads] = dfilters
        dgates[:, head] = (dscaled * x).sum((2, 3), dtype=gates.dtype)
        dx.addcmul_(dscaled, scale)
    return dx, dgates, dweight


def _scale(gates: Tensor, head: int, x: Tensor) -> Tensor:
    return gates[:, head, :, None, None].to(x.dtype)
