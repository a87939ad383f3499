"""`gated_conv2d` on the kept channels only: for each head, gather those that each sample keeps, then convolve them.

The backward pass gathers them again, so nothing beside the input is kept. Needs the number of kept channels as a Python
number, which only the CPU has at hand.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import per_sample
from .per_sample import Pair

# oneDNN's group convolutions are fast for whole vectors of channels: half as fast for 29 as for 32.
VECTOR = 16
MOST = 2**21  # gathered values at a time, if that is a head at least: they should stay in the cache


def forward(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """As `reference.gated_conv2d`."""
    kept = _Kept(x, gates, weight, padding)
    y = x.new_empty(per_sample.output_shape(x.shape, weight.shape, stride, padding, dilation))
    parts = y.unflatten(1, (-1, gates.shape[1])).unbind(2)
    for some in kept.some_heads():
        for head, inputs, filters in zip(some.heads, some.inputs, some.scaled()):
            per_sample.forward(parts[head], inputs, filters, stride, padding, dilation)
    return y


def backward(
    grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, gates and weight; nothing is computed for dropped channels."""
    kept = _Kept(x, gates, weight, padding)
    parts = grad.contiguous().unflatten(1, (-1, gates.shape[1])).unbind(2)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dgates, dtable = kept.gates.new_zeros(kept.gates.numel()), torch.zeros_like(kept.table)
    for some in kept.some_heads():
        dinputs = torch.empty_like(some.inputs)
        dfilters = torch.empty_like(some.filters)
        for head, *operands, filters in zip(some.heads, dinputs, some.inputs, dfilters, some.scaled()):
            dinput, inputs, dfilter = operands
            found = per_sample.backward(dinput, parts[head], inputs, filters, stride, padding, dilation)
            dfilter.copy_(found.transpose(1, 2))
        dx.flatten(0, 1).index_add_(0, some.rows, dinputs.flatten(0, 2))
        dgates.index_copy_(0, some.places, (dfilters * some.filters).flatten(3).sum(3, dtype=gates.dtype).flatten())
        dtable.index_add_(0, some.table_rows, dfilters.mul_(some.scale).flatten(0, 2))
    dgates = dgates.view_as(kept.gates).transpose(0, 1).contiguous()
    dweight = dtable.unflatten(0, (gates.shape[1], -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    return dx, dgates, dweight


class _Some(NamedTuple):
    """What some of the heads keep. H counts these heads."""

    heads: range
    inputs: Tensor
    """[H, B, kept, height, width]"""
    filters: Tensor
    """[H, B, kept, O / heads, kh, kw]: the filters' parts for these channels."""
    scale: Tensor
    """[H, B, kept, 1, 1, 1]"""
    places: Tensor
    """Where they are among the gates [heads, B, C], counted through, as are the next two."""
    rows: Tensor
    """Where among the input's channels [B, C]."""
    table_rows: Tensor
    """Where in the table of filters [heads, C]."""

    def scaled(self) -> Tensor:
        """[H, B, O / heads, kept, kh, kw]: every sample's filters."""
        return (self.filters * self.scale).transpose(2, 3)


class _Kept:
    """Finds the channels that are kept, and fetches them and what the filters have for them."""

    def __init__(self, x: Tensor, gates: Tensor, weight: Tensor, padding: Pair):
        batch, self.heads, self.channels = gates.shape
        self.x = x.contiguous()
        self.gates = gates.transpose(0, 1).contiguous()
        # [heads x C, O / heads, kh, kw]: what a kept channel needs lies together.
        self.table = weight.unflatten(0, (-1, self.heads)).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()
        count = most_kept(gates)
        if not per_sample.is_pointwise(weight.shape, padding):
            count = min(self.channels, -(-count // VECTOR) * VECTOR)
        places = self.gates.flatten().nonzero()
        if len(places) != gates.shape[1] * batch * count or not count:
            # Where a head keeps fewer, channels with a gate of zero fill up.
            channels = self.gates.topk(max(count, 1), sorted=False).indices
            first = torch.arange(0, self.gates.numel(), self.channels, device=gates.device)
            places = channels + first.view(self.heads, batch, 1)
        self.places = places.view(self.heads, -1)

    def some_heads(self) -> Iterator[_Some]:
        """The heads, a few at a time."""
        batch = len(self.x)
        values = self.places.shape[1] * self.x.shape[2] * self.x.shape[3]
        step = max(1, MOST // values)
        for start in range(0, self.heads, step):
            heads = range(start, min(start + step, self.heads))
            places = self.places[start : start + step].flatten()
            rows = places % (batch * self.channels)
            table_rows = places // (batch * self.channels) * self.channels + places % self.channels
            shape = len(heads), batch, -1
            yield _Some(
                heads,
                self.x.flatten(0, 1).index_select(0, rows).unflatten(0, shape),
                self.table.index_select(0, table_rows).unflatten(0, shape),
                self.gates.flatten().index_select(0, places).to(self.x.dtype).view(*shape, 1, 1, 1),
                places,
                rows,
                table_rows,
            )


def most_kept(gates: Tensor) -> int:
    """The largest number of channels that a head keeps for a sample."""
    return int((gates != 0).sum(-1).max()) if gates.numel() else 0
