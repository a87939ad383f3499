"""`gated_conv2d` head by head, each from a scaled copy of the input that is freed before the next one is made.

The backward pass scales the input again, so that nothing as large as heads x C x H x W is ever kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_desc import ConvDesc, Pair
from .base import Backend, Gradients, Norm
from .per_sample import conv2d_backward


class ScaledInputs(Backend):
    name = "scaled_inputs"

    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        return scaled_inputs(x, gates, weight, desc.stride, desc.padding, desc.dilation)

    def backward(
        self,
        desc: ConvDesc,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        norm: Norm | None = None,
    ) -> Gradients:
        heads = desc.heads
        dx, dgates, dweight = torch.zeros_like(x), torch.empty_like(gates), torch.empty_like(weight)
        for head in range(heads):
            scale = _scale(gates, head, x)
            filters = weight[head::heads]
            part = grad[:, head::heads].contiguous()
            dscaled, dfilters = conv2d_backward(part, x * scale, filters, desc.stride, desc.padding, desc.dilation)
            dweight[head::heads] = dfilters
            dgates[:, head] = (dscaled * x).sum((2, 3), dtype=gates.dtype)
            dx.addcmul_(dscaled, scale)
        return Gradients(dx, dgates, dweight)


def scaled_inputs(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`."""
    heads = gates.shape[1]
    parts = [
        F.conv2d(x * _scale(gates, head, x), weight[head::heads], None, stride, padding, dilation)
        for head in range(heads)
    ]
    return torch.stack(parts, 2).flatten(1, 2)


def _scale(gates: Tensor, head: int, x: Tensor) -> Tensor:
    return gates[:, head, :, None, None].to(x.dtype)
