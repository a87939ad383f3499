"""The passes over the features that cuDNN's convolutions of scaled inputs need around them, as Triton kernels.

Norm, ReLU and gates are applied to what is read, in float32, and nothing but the operands of the convolutions is
written: one pass makes the inputs of all heads, another one adds up their gradients. See triton_layer.py for how x may
lie in memory. No two programs write to the same place and there are no atomics.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base import Norm
from .triton_layer import TILE, Layout, multiple, tile

__all__ = ["combine", "filter_gradients", "scale"]


@triton.jit
def _normalized(value, scale, shift, channel, mask):
    """x after norm and ReLU, if there are, and whether it passes the ReLU; NaN passes."""
    passes = value == value
    if scale is not None:
        value = value * tl.load(scale + channel, mask, 0.0)[:, None] + tl.load(shift + channel, mask, 0.0)[:, None]
        passes = ~(value <= 0)
        value = tl.where(passes, value, 0.0)
    return value, passes


@triton.jit(do_not_specialize=["batch"])
def _scale(
    x,
    scale,
    shift,
    gates,
    out,
    batch,
    channels,
    pixels,
    heads,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of one image: out [heads, batch, channels, pixels], or [batch, channels, pixels] without gates."""
    if LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    image = tl.program_id(1)
    ranges = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % ranges * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.program_id(0) // ranges * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = channel < channels
    offset, exists = tile(channel, pixel, channels, pixels, LAST)
    base = tl.cast(image, tl.int64) * channels * pixels
    value, _ = _normalized(tl.load(x + base + offset, exists, 0.0).to(tl.float32), scale, shift, channel, mask)
    if gates is None:
        tl.store(out + base + offset, value.to(out.dtype.element_ty), exists)
    else:
        for head in range(0, heads):
            gate = tl.load(gates + (image * heads + head) * channels + channel, mask, 0.0)[:, None]
            scaled = tl.where(gate != 0, value * gate, 0.0)  # dropped channels leave no trace, even NaN
            tl.store(out + base + offset, scaled.to(out.dtype.element_ty), exists)
            base += tl.cast(batch, tl.int64) * channels * pixels


@triton.jit
def _combine(
    x,
    scale,
    shift,
    gates,
    dscaled,
    dx,
    dgates,
    dscale,
    dshift,
    channels,
    pixels,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Some channels of one image: dx as x, dgates [batch, heads, channels], dscale and dshift [batch, channels]."""
    if LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    image = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    head_of_row = tl.arange(0, BLOCK_H)[:, None]
    of_gates = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    of_scale = tl.zeros([BLOCK_C], tl.float32)
    of_shift = tl.zeros([BLOCK_C], tl.float32)
    base = tl.cast(image, tl.int64) * channels * pixels
    for start in range(0, pixels, BLOCK_P):
        offset, exists = tile(channel, start + tl.arange(0, BLOCK_P), channels, pixels, LAST)
        value = tl.load(x + base + offset, exists, 0.0).to(tl.float32)
        u, passes = _normalized(value, scale, shift, channel, mask)
        total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for head in tl.static_range(HEADS):
            part = tl.load(dscaled[head] + base + offset, exists, 0.0).to(tl.float32)
            if gates is None:
                total += part
            else:
                gate = tl.load(gates + (image * HEADS + head) * channels + channel, mask, 0.0)[:, None]
                total += tl.where(gate != 0, part * gate, 0.0)
                of_gates += tl.where(head_of_row == head, tl.sum(part * u, 1)[None, :], 0.0)
        if scale is not None:
            passes = passes & (total != 0)
            total = tl.where(passes, total, 0.0)
            of_scale += tl.sum(tl.where(passes, total * value, 0.0), 1)
            of_shift += tl.sum(total, 1)
            total = tl.where(passes, total * tl.load(scale + channel, mask, 0.0)[:, None], 0.0)
        tl.store(dx + base + offset, total.to(dx.dtype.element_ty), exists)
    if gates is not None:
        row = (image * HEADS + head_of_row) * channels + channel[None, :]
        exists = (head_of_row < HEADS) & mask[None, :]
        kept = tl.load(gates + row, exists, 0.0) != 0
        tl.store(dgates + row, tl.where(kept, of_gates, 0.0), exists)
    if scale is not None:
        tl.store(dscale + image * channels + channel, of_scale, mask)
        tl.store(dshift + image * channels + channel, of_shift, mask)


@triton.jit(do_not_specialize=["batch", "gate_programs"])
def _filter_gradients(
    dfilters,
    weight,
    gates,
    dgates,
    dweight,
    batch,
    outputs,
    channels,
    heads,
    gate_programs,
    VECTOR: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From dfilters [batch, outputs, channels]: the first programs compute dgates, of one image and head each, the
    others dweight [outputs, channels]."""
    channels = multiple(channels, VECTOR)
    program = tl.program_id(0)
    ranges = tl.cdiv(channels, BLOCK_C)
    channel = program % ranges * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = channel < channels
    sums = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    if program < gate_programs:
        row = program // ranges  # of the gates
        dfilters += tl.cast(row // heads, tl.int64) * outputs * channels
        for start in range(0, outputs // heads, BLOCK_O):
            filter_ = start + tl.arange(0, BLOCK_O)[:, None]
            place = (filter_ * heads + row % heads) * channels + channel
            exists = (filter_ < outputs // heads) & mask
            part = tl.load(dfilters + place, exists, 0.0).to(tl.float32)
            sums += part * tl.load(weight + place, exists, 0.0).to(tl.float32)
        kept = tl.load(gates + row * channels + channel, mask, 0.0) != 0
        tl.store(dgates + row * channels + channel, tl.where(kept, tl.sum(sums, 0)[None, :], 0.0), mask)
    else:
        output = (program - gate_programs) // ranges * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
        exists = (output < outputs) & mask
        place = output * channels + channel
        own_gates = gates + output % heads * channels + channel
        for _ in range(0, batch):
            part = tl.load(dfilters + place, exists, 0.0).to(tl.float32)
            gate = tl.load(own_gates, exists, 0.0)
            sums += tl.where(gate != 0, part * gate, 0.0)
            dfilters += outputs * channels
            own_gates += heads * channels
        tl.store(dweight + place, sums.to(dweight.dtype.element_ty), exists)


def scale(x: Tensor, norm: Norm | None, gates: Tensor | None) -> Tensor:
    """The inputs of all heads [heads, B, C, H, W], `relu(x * scale + shift) * gates`; without gates [B, C, H, W].

    Args:
        x: [B, C, H, W], contiguous or channels-last, as each of the results will be.
        gates: [B, heads, C] in float32.
    """
    batch, channels, height, width = x.shape
    heads = 1 if gates is None else gates.shape[1]
    out = x.new_empty(heads * x.numel()).as_strided((heads, *x.shape), (x.numel(), *x.stride()))
    layout = Layout.of(x, 64, TILE // 2)
    tiles = triton.cdiv(channels, layout.block_c) * triton.cdiv(height * width, layout.block_p)
    with torch.cuda.device_of(x):
        _scale[(tiles, batch)](
            x,
            *(norm or (None, None)),
            gates,
            out,
            batch,
            channels,
            height * width,
            heads,
            **layout.constants,
            num_warps=4,
        )
    return out[0] if gates is None else out


def combine(
    x: Tensor, norm: Norm | None, gates: Tensor | None, dscaled: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x and of the gates, and by sample [B, C] those of the norm, from those of what `scale` returned;
    arguments as there."""
    batch, channels, height, width = x.shape
    heads, dx = len(dscaled), torch.empty_like(x)
    dgates = None if gates is None else torch.empty_like(gates)
    dscale, dshift = (None, None) if norm is None else norm.scale.new_empty(2, batch, channels).unbind()
    layout = Layout.of(x, 32, TILE // 2)
    with torch.cuda.device_of(x):
        _combine[(triton.cdiv(channels, layout.block_c), batch)](
            x,
            *(norm or (None, None)),
            gates,
            tuple(dscaled),
            dx,
            dgates,
            dscale,
            dshift,
            channels,
            height * width,
            HEADS=heads,
            BLOCK_H=triton.next_power_of_2(heads),
            **layout.constants,
            num_warps=4,
        )
    return dx, dgates, dscale, dshift


def filter_gradients(dfilters: Tensor, weight: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gates [B, heads, C] and 1x1 filters [O, C, 1, 1] from those of each sample's scaled filters
    [B, O, C, 1, 1], which are contiguous as these are."""
    batch, heads, channels = gates.shape
    outputs = len(weight)
    dgates, dweight = torch.empty_like(gates), torch.empty_like(weight)
    block_o, block_c = 32, min(triton.next_power_of_2(channels), 128)
    ranges = triton.cdiv(channels, block_c)
    gate_programs = batch * heads * ranges
    with torch.cuda.device_of(gates):
        _filter_gradients[(gate_programs + ranges * triton.cdiv(outputs, block_o),)](
            dfilters,
            weight,
            gates,
            dgates,
            dweight,
            batch,
            outputs,
            channels,
            heads,
            gate_programs,
            VECTOR=math.gcd(channels, 16),
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return dgates, dweight
