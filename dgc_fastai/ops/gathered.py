"""`gated_conv2d` on the kept channels only: for each head, gather those that each sample keeps, then convolve them.

The backward pass gathers them again, so nothing beside the input is kept. Needs the number of kept channels as a Python
number, which only the CPU has at hand.
"""

import torch
from torch import Tensor

from . import per_sample
from .per_sample import Pair

# oneDNN's group convolutions are fast for whole vectors of channels: half as fast for 29 as for 32.
VECTOR = 16


def forward(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`."""
    kept = _Kept(x, gates, weight, padding)
    y = x.new_empty(per_sample.output_shape(x.shape, weight.shape, stride, padding, dilation))
    parts = y.unflatten(1, (-1, gates.shape[1]))
    for head in range(gates.shape[1]):
        per_sample.forward(parts[:, :, head], kept.inputs(head), kept.filters(head), stride, padding, dilation)
    return y


def backward(
    grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, gates and weight; nothing is computed for dropped channels."""
    kept = _Kept(x, gates, weight, padding)
    parts = grad.contiguous().unflatten(1, (-1, gates.shape[1]))
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dgates, dtable = torch.zeros_like(gates), torch.zeros_like(kept.table)
    for head in range(gates.shape[1]):
        inputs, filters = kept.inputs(head), kept.filters(head)
        dinputs = torch.empty_like(inputs)
        dfilters = per_sample.backward(dinputs, parts[:, :, head], inputs, filters, stride, padding, dilation)
        dx.flatten(0, 1).index_add_(0, kept.rows[:, head].flatten(), dinputs.flatten(0, 1))
        dfilters = dfilters.transpose(1, 2)  # [B, kept, O / heads, kh, kw], as they lie in the table
        dkept = (dfilters * kept.fetched(head)).sum((2, 3, 4), dtype=gates.dtype)
        dgates[:, head].scatter_(1, kept.channels[:, head], dkept)
        dtable[head].index_add_(0, kept.channels[:, head].flatten(), (dfilters * kept.scale(head)).flatten(0, 1))
    return dx, dgates, dtable.permute(2, 0, 1, 3, 4).flatten(0, 1)


class _Kept:
    """Which channels each sample and head keeps, and how to fetch them and their filters."""

    def __init__(self, x: Tensor, gates: Tensor, weight: Tensor, padding: Pair):
        batch, heads, channels = gates.shape
        count = most_kept(gates)
        if not per_sample.is_pointwise(weight.shape, padding):
            count = min(channels, -(-count // VECTOR) * VECTOR)
        kept = gates.flatten().nonzero()
        if len(kept) == batch * heads * count > 0:
            self.channels = (kept % channels).view(batch, heads, count)
        else:  # where a head keeps fewer, channels with a gate of zero fill up
            self.channels = gates.topk(max(count, 1), sorted=False).indices
        self.rows = self.channels + channels * torch.arange(batch, device=x.device).view(-1, 1, 1)
        self.gates = gates.gather(2, self.channels)
        self.x = x.contiguous()
        # [heads, C, O / heads, kh, kw]: what a kept channel needs lies together.
        self.table = weight.unflatten(0, (-1, heads)).permute(1, 2, 0, 3, 4).contiguous()

    def inputs(self, head: int) -> Tensor:
        """[B, kept, H, W]"""
        rows = self.x.flatten(0, 1).index_select(0, self.rows[:, head].flatten())
        return rows.unflatten(0, (len(self.x), -1))

    def fetched(self, head: int) -> Tensor:
        """[B, kept, O / heads, kh, kw]: the filters' parts, not scaled."""
        rows = self.table[head].index_select(0, self.channels[:, head].flatten())
        return rows.unflatten(0, (len(self.x), -1))

    def scale(self, head: int) -> Tensor:
        """[B, kept, 1, 1, 1]"""
        return self.gates[:, head, :, None, None, None].to(self.x.dtype)

    def filters(self, head: int) -> Tensor:
        """[B, O / heads, kept, kh, kw], scaled."""
        return (self.fetched(head) * self.scale(head)).transpose(1, 2)


def most_kept(gates: Tensor) -> int:
    """The largest number of channels that a head keeps for a sample."""
    return int((gates != 0).sum(-1).max()) if gates.numel() else 0
