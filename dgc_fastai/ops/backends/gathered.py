"""`gated_conv2d` on the kept channels only: for each head, gather those that each sample keeps, then convolve them.

The backward pass gathers them again, so nothing beside the input is kept. Needs the number of kept channels as a Python
number, which only the CPU has at hand.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..conv_desc import ConvDesc
from . import per_sample
from .base import Backend, Gradients, Norm

# oneDNN's group convolutions are fast for whole vectors of channels: half as fast for 29 as for 32.
CHANNEL_MULTIPLE = 16
MAX_VALUES = 2**21  # gathered at a time, but at least one head: they should stay in the cache


class Gathered(Backend):
    name = "gathered"

    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        geometry = desc.stride, desc.padding, desc.dilation
        kept = _Kept(desc, x, gates, weight)
        y = x.new_empty(desc.output_shape)
        parts = y.unflatten(1, (-1, desc.heads)).unbind(2)
        for some in kept.some_heads():
            for head, inputs, filters in zip(some.heads, some.inputs, some.scaled()):
                per_sample.forward(parts[head], inputs, filters, *geometry)
        return y

    def backward(
        self,
        desc: ConvDesc,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        norm: Norm | None = None,
    ) -> Gradients:
        geometry = desc.stride, desc.padding, desc.dilation
        kept = _Kept(desc, x, gates, weight)
        parts = grad.contiguous().unflatten(1, (-1, desc.heads)).unbind(2)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        dgates, drows = kept.gates.new_zeros(kept.gates.numel()), torch.zeros_like(kept.weight_rows)
        for some in kept.some_heads():
            dinputs = torch.empty_like(some.inputs)
            dfilters = torch.empty_like(some.filters)
            for head, *operands, filters in zip(some.heads, dinputs, some.inputs, dfilters, some.scaled()):
                dinput, inputs, dfilter = operands
                found = per_sample.backward(dinput, parts[head], inputs, filters, *geometry)
                dfilter.copy_(found.transpose(1, 2))
            dx.flatten(0, 1).index_add_(0, some.input_rows, dinputs.flatten(0, 2))
            sums = (dfilters * some.filters).flatten(3).sum(3, dtype=gates.dtype)
            dgates.index_copy_(0, some.places, sums.flatten())
            drows.index_add_(0, some.weight_rows, dfilters.mul_(some.scale).flatten(0, 2))
        dgates = dgates.view_as(kept.gates).transpose(0, 1).contiguous()
        dweight = drows.unflatten(0, (desc.heads, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)
        return Gradients(dx, dgates, dweight)


class _Some(NamedTuple):
    """What some of the heads keep; H is the number of these heads."""

    heads: range
    inputs: Tensor
    """[H, B, kept, height, width]"""
    filters: Tensor
    """[H, B, kept, O / heads, kh, kw]: what the filters have for these channels."""
    scale: Tensor
    """[H, B, kept, 1, 1, 1]"""
    places: Tensor
    """Indices of the kept channels into the flattened gates [heads, B, C]."""
    input_rows: Tensor
    """Into the flattened channels of the input [B, C]."""
    weight_rows: Tensor
    """Into `_Kept.weight_rows` [heads, C]."""

    def scaled(self) -> Tensor:
        """[H, B, O / heads, kept, kh, kw]: every sample's filters."""
        return (self.filters * self.scale).transpose(2, 3)


class _Kept:
    """Finds the channels that are kept, and fetches them and what the filters have for them."""

    def __init__(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor):
        batch, self.heads, self.channels = gates.shape
        self.x = x.contiguous()
        self.gates = gates.transpose(0, 1).contiguous()
        # [heads x C, O / heads, kh, kw]: what the filters have for a channel lies together.
        self.weight_rows = weight.unflatten(0, (-1, self.heads)).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()
        count = max_kept(gates)
        if not desc.is_pointwise:
            count = min(self.channels, -(-count // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE)
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
        if batch == 0:
            return
        values = self.places.shape[1] * self.x.shape[2] * self.x.shape[3]
        step = max(1, MAX_VALUES // values)
        for start in range(0, self.heads, step):
            heads = range(start, min(start + step, self.heads))
            places = self.places[start : start + step].flatten()
            input_rows = places % (batch * self.channels)
            weight_rows = places // (batch * self.channels) * self.channels + places % self.channels
            shape = len(heads), batch, -1
            yield _Some(
                heads,
                self.x.flatten(0, 1).index_select(0, input_rows).unflatten(0, shape),
                self.weight_rows.index_select(0, weight_rows).unflatten(0, shape),
                self.gates.flatten().index_select(0, places).to(self.x.dtype).view(*shape, 1, 1, 1),
                places,
                input_rows,
                weight_rows,
            )


def max_kept(gates: Tensor) -> int:
    """The largest number of channels that a head keeps for a sample."""
    return int((gates != 0).sum(-1).max()) if gates.numel() else 0
