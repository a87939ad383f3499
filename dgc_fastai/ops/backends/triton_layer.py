"""What a DGC layer computes around its convolution, as Triton kernels: normalization, pooling, gates, selection.

Su, Fang et al., "Dynamic Group Convolution for Accelerating Convolutional Neural Networks", ECCV 2020, section 3.
In plain PyTorch these are some forty small operations a layer, and passes over the features on top; a GPU waits for
their launches longer than it computes. Here they are four launches, two forward and two backward:

    statistics     mean and variance of the batch, in training with a norm of its own: partial sums, which the next
                   kernel adds up
    select         scale and shift of the norm, running statistics, the mean of u = relu(x * scale + shift) over the
                   pixels (or of x), gates, penalty, the smallest gates dropped
    select_backward: the gates' hidden layers and the pooled features
    finish_backward: the gates' weights and biases, the norm's, and all of dx that is not the convolution's

The convolution between them applies scale and shift where it reads x, so u never exists in memory. `select` also counts
the active pixels (u > 0) and sums x over them: with these, the gradients of scale and shift that come back through the
pooling need no pass over x.

No two programs write to the same place and there are no atomics: the same input gives the same bits. All sums are in
float32. x is contiguous or channels-last, its pixels [H * W] flat, and is read 16 bytes at a time where the number of
channels (channels-last) or of pixels allows it. Numbers of samples are no constants: a smaller last batch runs the same
code.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .per_sample import is_channels_last

__all__ = ["MAX_CHANNELS", "Gates", "Norm", "Selected", "backward", "select"]

MAX_CHANNELS = 8192  # a program holds one value of each in registers
MAX_PARTIALS = 8192  # sums that each program of `_select` adds up
PROGRAMS = 512  # a few for each multiprocessor of a large GPU
TILE = 4096  # values that a program reads at a time


@triton.jit
def tile(channel, pixel, channels, pixels, LAST: tl.constexpr):
    """Offsets of a tile [channels, pixels] within one image, and which of it exists."""
    exists = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    if LAST:
        return channel[:, None] + pixel[None, :] * channels, exists
    return channel[:, None] * pixels + pixel[None, :], exists


@triton.jit
def multiple(size, VECTOR: tl.constexpr):
    """The same number, in a form that shows the compiler its divisor."""
    return size // VECTOR * VECTOR


@triton.jit(do_not_specialize=["batch", "share"])
def _statistics(
    x,
    partial,
    batch,
    channels,
    pixels,
    share,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """partial [2, groups, channels]: mean, and sum of squared differences from it, of `share` samples each.

    Differences from the first pixel are summed, so that a mean far from zero takes no digits from the variance.
    """
    if LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    group = tl.program_id(1)
    first, last = group * share, tl.minimum(group * share + share, batch)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += tl.cast(first, tl.int64) * channels * pixels
    origin = tl.load(x + (channel if LAST else channel * pixels), channel < channels, 0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for _ in range(first, last):
        for start in range(0, pixels, BLOCK_P):
            offset, exists = tile(channel, start + tl.arange(0, BLOCK_P), channels, pixels, LAST)
            difference = tl.load(x + offset, exists, 0.0).to(tl.float32) - origin[:, None]
            difference = tl.where(exists, difference, 0.0)
            sums += difference
            squares += difference * difference
        x += channels * pixels
    total = tl.sum(sums, 1)
    mean = total / ((last - first) * pixels).to(tl.float32)
    partial += group * channels + channel
    tl.store(partial, origin + mean, channel < channels)
    tl.store(partial + tl.num_programs(1) * channels, tl.sum(squares, 1) - total * mean, channel < channels)


@triton.jit
def _moments(
    partial, running_mean, running_var, batch, channels, pixels, share, groups, channel, BLOCK_G: tl.constexpr
):
    """Mean and variance of some channels: the batch's from its parts, or the running ones."""
    mask = channel < channels
    if partial is None:
        mean = tl.load(running_mean + channel, mask, 0.0).to(tl.float32)
        var = tl.load(running_var + channel, mask, 1.0).to(tl.float32)
    else:
        group = tl.arange(0, BLOCK_G)
        count = (tl.maximum(tl.minimum(share, batch - group * share), 0) * pixels).to(tl.float32)[:, None]
        place = group[:, None] * channels + channel[None, :]
        exists = (group < groups)[:, None] & mask[None, :]
        means = tl.load(partial + place, exists, 0.0)
        squares = tl.load(partial + groups * channels + place, exists, 0.0)
        total = batch.to(tl.float32) * pixels
        mean = tl.sum(means * count, 0) / total
        difference = means - mean[None, :]
        var = tl.sum(squares + count * difference * difference, 0) / total
    return mean, var


@triton.jit
def _update(running, value, momentum, mask):
    before = tl.load(running, mask, 0.0).to(tl.float32)
    tl.store(running, (before + momentum * (value - before)).to(running.dtype.element_ty), mask)


@triton.jit
def _excited(hidden, excite, bias, place, channels, units, BLOCK_U: tl.constexpr):
    """W2 hidden + b of one head, before the ReLU."""
    exists = place < channels
    excited = tl.load(bias + place, exists, 0.0).to(tl.float32)
    for start in range(0, units, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        value = tl.load(hidden + unit, unit < units, 0.0)
        weight = _excite(excite, place, unit, channels, units)
        excited += tl.sum(weight * value[None, :], 1)
    return excited


@triton.jit
def _squeeze(squeeze, unit, place, channels, units):
    """W1 of one head, a tile [units, channels]."""
    exists = (unit < units)[:, None] & (place < channels)[None, :]
    return tl.load(squeeze + unit[:, None] * channels + place[None, :], exists, 0.0).to(tl.float32)


@triton.jit
def _excite(excite, place, unit, channels, units):
    """W2 of one head, a tile [channels, units]."""
    exists = (place < channels)[:, None] & (unit < units)[None, :]
    return tl.load(excite + place[:, None] * units + unit[None, :], exists, 0.0).to(tl.float32)


@triton.jit
def _smallest(gate, count, exists):
    """The count-th smallest gate. Gates are not negative, so their bits are in the order of the numbers, and NaN comes
    last, as in PyTorch: the largest number that has fewer than `count` gates below it, found bit by bit."""
    bits = tl.where(gate != gate, 0x7FC00000, gate.to(tl.int32, bitcast=True))
    bits = tl.where(exists, bits, 0x7FFFFFFF)
    found = tl.full([], 0, tl.int32)
    for step in range(0, 31):
        larger = found + (1 << (30 - step))
        below = tl.sum((bits < larger).to(tl.int32))
        found = tl.where(below < count, larger, found)
    return found.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["batch", "share", "groups"])
def _select(
    x,
    partial,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    tracked,
    folded,
    squeeze,
    excite,
    bias,
    inactive,
    sums,
    hidden,
    gates,
    penalty,
    momentum,
    eps,
    batch,
    channels,
    pixels,
    heads,
    units,
    share,
    groups,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """One image: folded [4, channels] (scale, shift, mean, 1 / deviation), sums [3, batch, channels] (mean of u, number
    of active pixels, sum of x over these), hidden [batch, heads, units], gates [batch, heads, channels] and penalty
    [batch, heads]. All programs compute the same scale and shift; that of the first image writes them."""
    if LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    image = tl.program_id(0)
    x += tl.cast(image, tl.int64) * channels * pixels
    for begin in range(0, channels, BLOCK_C):
        channel = begin + tl.arange(0, BLOCK_C)
        mask = channel < channels
        if norm_weight is not None:
            mean, var = _moments(
                partial, running_mean, running_var, batch, channels, pixels, share, groups, channel, BLOCK_G
            )
            inverse = 1 / tl.sqrt(var + eps)
            scale = inverse * tl.load(norm_weight + channel, mask, 0.0).to(tl.float32)
            shift = tl.load(norm_bias + channel, mask, 0.0).to(tl.float32) - mean * scale
            if image == 0:
                tl.store(folded + channel, scale, mask)
                tl.store(folded + channels + channel, shift, mask)
                tl.store(folded + 2 * channels + channel, mean, mask)
                tl.store(folded + 3 * channels + channel, inverse, mask)
                if partial is not None:
                    total = batch.to(tl.float32) * pixels
                    _update(running_mean + channel, mean, momentum, mask)
                    _update(running_var + channel, var * (total / (total - 1)), momentum, mask)
        pooled = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        active = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for start in range(0, pixels, BLOCK_P):
            offset, exists = tile(channel, start + tl.arange(0, BLOCK_P), channels, pixels, LAST)
            value = tl.load(x + offset, exists, 0.0).to(tl.float32)
            if norm_weight is not None:
                u = value * scale[:, None] + shift[:, None]
                passes = exists & ~(u <= 0)  # NaN passes, as through ReLU
                pooled += tl.where(passes, u, 0.0)
                active += passes.to(tl.float32)
                total += tl.where(passes, value, 0.0)
            else:
                pooled += value
        row = sums + image * channels + channel
        tl.store(row, tl.sum(pooled, 1) / pixels, mask)
        if norm_weight is not None:
            tl.store(row + batch * channels, tl.sum(active, 1), mask)
            tl.store(row + 2 * batch * channels, tl.sum(total, 1), mask)
    if tracked is not None:
        if image == 0:
            tl.store(tracked, tl.load(tracked) + 1)

    tl.debug_barrier()  # what other threads of this program have pooled
    place = tl.arange(0, BLOCK)
    exists = place < channels
    pooled = tl.load(sums + image * channels + place, exists, 0.0)
    count = tl.load(inactive)
    for head in range(0, heads):
        row = image * heads + head
        for start in range(0, units, BLOCK_U):
            unit = start + tl.arange(0, BLOCK_U)
            weight = _squeeze(squeeze + head * units * channels, unit, place, channels, units)
            value = tl.sum(weight * pooled[None, :], 1)
            tl.store(hidden + row * units + unit, tl.where(value <= 0, 0.0, value), unit < units)
        tl.debug_barrier()
        excited = _excited(
            hidden + row * units,
            excite + head * units * channels,
            bias + head * channels,
            place,
            channels,
            units,
            BLOCK_U,
        )
        gate = tl.where(excited <= 0, 0.0, excited)
        tl.store(penalty + row, tl.sum(gate) / (batch.to(tl.float32) * channels))
        if count > 0:
            gate = tl.where(gate <= _smallest(gate, count, exists), 0.0, gate)
        tl.store(gates + row * channels + place, gate, exists)


@triton.jit(do_not_specialize=["batch", "share", "tiles", "norm_rows", "step_image", "step_head"])
def _select_backward(
    dgates,
    dscale,
    dshift,
    dpenalty,
    sums,
    hidden,
    gates,
    squeeze,
    excite,
    bias,
    dexcited,
    dhidden,
    dpooled,
    dnorm,
    step_image,
    step_head,
    batch,
    channels,
    pixels,
    heads,
    units,
    share,
    tiles,
    norm_rows,
    norm_step,
    BLOCK: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """For `share` images and one head, from the convolution's dgates [tiles, batch, heads, channels], dscale and dshift
    [norm_rows, channels], norm_step apart, and from dpenalty [batch, heads]: dexcited [batch, heads, channels], dhidden
    [batch, heads, units], dpooled [batch, heads, channels], of which the sum over heads is meant, and dnorm [2, groups,
    heads, channels], whose sums over groups and heads are the gradients of scale and shift."""
    group, head = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    exists = place < channels
    squeeze += head * units * channels
    excite += head * units * channels
    all_dscale = tl.zeros([BLOCK], tl.float32)
    all_dshift = tl.zeros([BLOCK], tl.float32)
    for image in range(group * share, tl.minimum(group * share + share, batch)):
        row = image * heads + head
        dgate = tl.zeros([BLOCK], tl.float32)
        for part_of in range(0, tiles):
            part = (tl.cast(part_of, tl.int64) * batch * heads + row) * channels
            dgate += tl.load(dgates + part + place, exists, 0.0)
        # A dropped gate has no gradient from the convolution, whatever that says, but has one from the penalty.
        dgate = tl.where(tl.load(gates + row * channels + place, exists, 0.0) != 0, dgate, 0.0)
        if dpenalty is not None:
            share_of_one = tl.load(dpenalty + image * step_image + head * step_head)
            dgate += share_of_one / (batch.to(tl.float32) * channels)
        value = hidden + row * units
        excited = _excited(value, excite, bias + head * channels, place, channels, units, BLOCK_U)
        dgate = tl.where(exists & ~(excited <= 0), dgate, 0.0)
        tl.store(dexcited + row * channels + place, dgate, exists)
        dpool = tl.zeros([BLOCK], tl.float32)
        for start in range(0, units, BLOCK_U):
            unit = start + tl.arange(0, BLOCK_U)
            dunit = tl.sum(_excite(excite, place, unit, channels, units) * dgate[:, None], 0)
            dunit = tl.where(tl.load(value + unit, unit < units, 0.0) <= 0, 0.0, dunit)
            tl.store(dhidden + row * units + unit, dunit, unit < units)
            weight = _squeeze(squeeze, unit, place, channels, units)
            dpool += tl.sum(weight * dunit[:, None], 0)
        tl.store(dpooled + row * channels + place, dpool, exists)
        if dnorm is not None:
            at = sums + image * channels + place
            all_dshift += dpool / pixels * tl.load(at + batch * channels, exists, 0.0)
            all_dscale += dpool / pixels * tl.load(at + 2 * batch * channels, exists, 0.0)
            if head == 0:
                for norm_row in range(image, norm_rows, batch):  # the rows are dealt out among the images
                    part = tl.cast(norm_row, tl.int64) * norm_step + place
                    all_dscale += tl.load(dscale + part, exists, 0.0)
                    all_dshift += tl.load(dshift + part, exists, 0.0)
    if dnorm is not None:
        row = (group * heads + head) * channels + place
        tl.store(dnorm + row, all_dscale, exists)
        tl.store(dnorm + tl.num_programs(0) * heads * channels + row, all_dshift, exists)


@triton.jit
def _weights_backward(
    program,
    sums,
    hidden,
    dexcited,
    dhidden,
    dsqueeze,
    dexcite,
    dbias,
    batch,
    channels,
    heads,
    units,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Some channels and hidden units of one head: sums over all images."""
    ranges = tl.cdiv(channels, BLOCK_C)
    channel = program % ranges * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // ranges
    head = program % heads
    unit = program // heads * BLOCK_U + tl.arange(0, BLOCK_U)
    mask, real = channel < channels, unit < units
    of_squeeze = tl.zeros([BLOCK_U, BLOCK_C], tl.float32)
    of_excite = tl.zeros([BLOCK_C, BLOCK_U], tl.float32)
    of_bias = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, batch, BLOCK_B):
        image = start + tl.arange(0, BLOCK_B)[:, None]
        row = image * heads + head
        wide, narrow = (image < batch) & mask[None, :], (image < batch) & real[None, :]
        pooled = tl.load(sums + image * channels + channel[None, :], wide, 0.0)
        dgate = tl.load(dexcited + row * channels + channel[None, :], wide, 0.0)
        value = tl.load(hidden + row * units + unit[None, :], narrow, 0.0)
        dvalue = tl.load(dhidden + row * units + unit[None, :], narrow, 0.0)
        of_squeeze = tl.dot(tl.trans(dvalue), pooled, of_squeeze, input_precision="ieee")
        of_excite = tl.dot(tl.trans(dgate), value, of_excite, input_precision="ieee")
        of_bias += dgate
    dsqueeze += (head * units + unit)[:, None] * channels + channel[None, :]
    tl.store(dsqueeze, of_squeeze.to(dsqueeze.dtype.element_ty), real[:, None] & mask[None, :])
    dexcite += (head * channels + channel)[:, None] * units + unit[None, :]
    tl.store(dexcite, of_excite.to(dexcite.dtype.element_ty), mask[:, None] & real[None, :])
    if program < heads:  # one program for each channel
        tl.store(dbias + head * channels + channel, tl.sum(of_bias, 0).to(dbias.dtype.element_ty), mask)


@triton.jit
def _norm_backward(
    dnorm, folded, norm_weight, dnorm_weight, dnorm_bias, parts, count, channels, channel, first, TRAINING, BLOCK_E
):
    """The gradient of x that comes back through the batch's mean and variance is `factor * (x - mean) + constant`:
    factor, constant and mean of some channels. The `first` program writes the norm's own gradients."""
    mask = channel < channels
    of_scale = tl.zeros([BLOCK_E, channel.shape[0]], tl.float32)
    of_shift = tl.zeros([BLOCK_E, channel.shape[0]], tl.float32)
    for start in range(0, parts, BLOCK_E):
        part = start + tl.arange(0, BLOCK_E)[:, None]
        exists = (part < parts) & mask[None, :]
        of_scale += tl.load(dnorm + part * channels + channel[None, :], exists, 0.0)
        of_shift += tl.load(dnorm + (parts + part) * channels + channel[None, :], exists, 0.0)
    dscale, dshift = tl.sum(of_scale, 0), tl.sum(of_shift, 0)
    scale = tl.load(folded + channel, mask, 0.0)
    mean = tl.load(folded + 2 * channels + channel, mask, 0.0)
    inverse = tl.load(folded + 3 * channels + channel, mask, 0.0)
    dscale -= mean * dshift  # shift = bias - mean * scale
    if first:
        tl.store(dnorm_weight + channel, (dscale * inverse).to(dnorm_weight.dtype.element_ty), mask)
        tl.store(dnorm_bias + channel, dshift.to(dnorm_bias.dtype.element_ty), mask)
    if TRAINING:
        return -scale * inverse * inverse * dscale / count, -scale * dshift / count, mean
    return tl.zeros_like(mean), tl.zeros_like(mean), mean


@triton.jit
def _sum_parts(program, partial, result, parts, size, BLOCK: tl.constexpr):
    """result [size] of partial [parts, size]."""
    place = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        total += tl.load(partial + tl.cast(part, tl.int64) * size + place, place < size, 0.0)
    tl.store(result + place, total.to(result.dtype.element_ty), place < size)


@triton.jit(do_not_specialize=["batch", "share", "parts", "filter_parts", "filter_programs"])
def _finish_backward(
    x,
    dx_conv,
    dx,
    folded,
    norm_weight,
    dnorm,
    dnorm_weight,
    dnorm_bias,
    dpooled,
    sums,
    hidden,
    dexcited,
    dhidden,
    dsqueeze,
    dexcite,
    dbias,
    filter_sums,
    dfilters,
    batch,
    channels,
    pixels,
    heads,
    units,
    share,
    parts,
    weight_programs,
    filter_parts,
    filter_size,
    filter_programs,
    TRAINING: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Three jobs share a launch: the first programs compute the gradients of the gates' weights, the next ones add up
    those of the filters, and the last ones compute dx, each for some channels of `share` images."""
    if LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    program = tl.program_id(0)
    if program < weight_programs:
        _weights_backward(
            program,
            sums,
            hidden,
            dexcited,
            dhidden,
            dsqueeze,
            dexcite,
            dbias,
            batch,
            channels,
            heads,
            units,
            BLOCK_W,
            BLOCK_U,
            BLOCK_B,
        )
    elif program < weight_programs + filter_programs:
        if dfilters is not None:
            _sum_parts(program - weight_programs, filter_sums, dfilters, filter_parts, filter_size, BLOCK_F)
    else:
        program -= weight_programs + filter_programs
        ranges = tl.cdiv(channels, BLOCK_C)
        channel = program % ranges * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = channel < channels
        begin = program // ranges * share
        if norm_weight is not None:
            count = batch.to(tl.float32) * pixels
            factor, constant, mean = _norm_backward(
                dnorm,
                folded,
                norm_weight,
                dnorm_weight,
                dnorm_bias,
                parts,
                count,
                channels,
                channel,
                begin == 0,
                TRAINING,
                BLOCK_E,
            )
            scale = tl.load(folded + channel, mask, 0.0)
            shift = tl.load(folded + channels + channel, mask, 0.0)
        for image in range(begin, tl.minimum(begin + share, batch)):
            dpool = tl.zeros([BLOCK_C], tl.float32)
            for head in range(0, heads):
                dpool += tl.load(dpooled + (image * heads + head) * channels + channel, mask, 0.0)
            dpool = dpool / pixels
            base = tl.cast(image, tl.int64) * channels * pixels
            for start in range(0, pixels, BLOCK_P):
                offset, exists = tile(channel, start + tl.arange(0, BLOCK_P), channels, pixels, LAST)
                value = tl.load(dx_conv + base + offset, exists, 0.0).to(tl.float32)
                if norm_weight is not None:
                    source = tl.load(x + base + offset, exists, 0.0).to(tl.float32)
                    passes = ~(source * scale[:, None] + shift[:, None] <= 0)
                    value += tl.where(passes, (dpool * scale)[:, None], 0.0)
                    value += factor[:, None] * (source - mean[:, None]) + constant[:, None]
                else:
                    value += dpool[:, None]
                tl.store(dx + base + offset, value.to(dx.dtype.element_ty), exists)


class Gates(NamedTuple):
    """The weights of a layer's gates; see `gates.head_gates`."""

    squeeze: Tensor
    excite: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """A batch norm before the convolution, and the ReLU after it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    tracked: Tensor | None
    """Counts the batches, in training."""
    momentum: float
    eps: float
    training: bool
    """Whether it normalizes by the batch's statistics, which move the running ones, or by the running ones."""


class Selected(NamedTuple):
    """What `select` finds out. `backward` needs it again."""

    gates: Tensor
    """[B, heads, C], those of dropped channels zero."""
    penalty: Tensor
    """[B, heads]: their sum is that over the heads of the mean gate, taken before any was dropped."""
    folded: Tensor
    """[4, C]: scale and shift of the norm, mean and inverse standard deviation; empty without a norm."""
    sums: Tensor
    """[3, B, C]: mean of u, number of active pixels, sum of x over these; [1, B, C] without a norm."""
    hidden: Tensor
    """[B, heads, hidden]"""


class Layout(NamedTuple):
    """x as the kernels read it, and the sizes of their tiles."""

    last: bool
    vector: int
    block_c: int
    block_p: int

    @classmethod
    def of(cls, x: Tensor, most_channels: int, values: int = TILE) -> "Layout":
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        last = is_channels_last(x)
        wide = channels if last else pixels
        if last:
            block_c = min(triton.next_power_of_2(channels), most_channels)
            return cls(last, math.gcd(wide, 16), block_c, min(triton.next_power_of_2(pixels), values // block_c))
        block_p = min(triton.next_power_of_2(pixels), 1024)
        return cls(last, math.gcd(wide, 16), min(triton.next_power_of_2(channels), values // block_p), block_p)

    @property
    def constants(self) -> dict:
        return {"LAST": self.last, "VECTOR": self.vector, "BLOCK_C": self.block_c, "BLOCK_P": self.block_p}


def _shares(batch: int, most: int) -> tuple[int, int]:
    """A batch in at most so many groups: samples in each but the last, and the number of groups."""
    share = triton.cdiv(batch, max(1, min(batch, most)))
    return share, triton.cdiv(batch, share)


def _row_blocks(channels: int, units: int) -> dict:
    """BLOCK holds all channels; BLOCK_U hidden units at a time."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "BLOCK_U": max(1, min(triton.next_power_of_2(units), TILE // block))}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def select(x: Tensor, weights: Gates, inactive: Tensor, norm: Norm | None) -> Selected:
    """The gates of a layer from its input: two launches in training with a norm, otherwise one.

    Args:
        x: [B, C, H, W] in float32, bfloat16 or float16, contiguous or channels-last, with at least one sample.
        weights: of the gates.
        inactive: how many channels each head drops, an integer tensor of no dimensions, read on the device.
        norm: normalizes x, or None if x is as it is to be convolved. Training it moves its running statistics.
    """
    batch, channels, height, width = x.shape
    heads, units = weights.squeeze.shape[:2]
    pixels = height * width
    empty = torch.empty
    about: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    folded, sums = empty(4 if norm else 0, channels, **about), empty(3 if norm else 1, batch, channels, **about)
    hidden, gates = empty(batch, heads, units, **about), empty(batch, heads, channels, **about)
    penalty = empty(batch, heads, **about)
    share, groups = _shares(batch, max(8, min(64, MAX_PARTIALS // channels)))
    with torch.cuda.device_of(x):
        partial = None
        if norm is not None and norm.training:
            partial, layout = empty(2, groups, channels, **about), Layout.of(x, 16)
            _statistics[(triton.cdiv(channels, layout.block_c), groups)](
                x, partial, batch, channels, pixels, share, **layout.constants, num_warps=4
            )
        settings = (norm.momentum, norm.eps) if norm else (0.0, 0.0)
        _select[(batch,)](
            x,
            partial,
            *(norm[:4] if norm else (None,) * 4),
            norm.tracked if norm else None,
            folded,
            *_contiguous(*weights),
            inactive,
            sums,
            hidden,
            gates,
            penalty,
            *map(float, settings),
            batch,
            channels,
            pixels,
            heads,
            units,
            share,
            groups,
            **Layout.of(x, 64, TILE // 2).constants,
            BLOCK_G=triton.next_power_of_2(groups),
            **_row_blocks(channels, units),
            num_warps=8,
        )
    return Selected(gates, penalty, folded, sums, hidden)


class Upstream(NamedTuple):
    """What reaches a layer's gates and input from behind them. Sums over a first
    dimension of dgates, dscale and dshift are left to the kernels."""

    dx: Tensor
    """As x: the gradient that comes back through the convolution alone."""
    dfilters: Tensor
    """Of the filters, as they are or in parts; see `base.Gradients`."""
    dgates: Tensor
    """[parts, B, heads, C] or [B, heads, C]; of dropped gates anything."""
    dscale: Tensor | None
    """[parts, C] or [C], with a norm."""
    dshift: Tensor | None
    """In the same layout."""
    dpenalty: Tensor | None
    """[B, heads]"""


def _filter_gradient(found: Tensor, filters: Tensor) -> tuple[Tensor, bool]:
    """The gradient of the filters, or memory for it, and whether it is still to be summed."""
    if found.dim() == filters.dim():
        return found.to(filters.dtype), False
    if len(found) == 1 and filters.dtype == torch.float32:
        return found[0].as_strided(filters.shape, filters.stride()), False
    return torch.empty_like(filters), True


def backward(
    x: Tensor, filters: Tensor, weights: Gates, norm: Norm | None, selected: Selected, upstream: Upstream
) -> tuple[Tensor, Tensor, Gates, tuple[Tensor, Tensor] | None]:
    """The gradients of x, of the filters, of the gates' weights, and of the norm's weight and bias: two launches.

    Args:
        filters: whose type and layout their gradient has.
    """
    batch, channels, height, width = x.shape
    heads, units = weights.squeeze.shape[:2]
    pixels = height * width
    dx_conv, filter_sums, dgates, dscale, dshift, dpenalty = upstream
    dfilters, sums_filters = _filter_gradient(filter_sums, filters)
    if dscale is not None and dshift is not None:
        dscale, dshift = dscale.view(-1, channels), dshift.view(-1, channels)
    about: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    dexcited, dpooled = (torch.empty(batch, heads, channels, **about) for _ in range(2))
    dhidden = torch.empty(batch, heads, units, **about)
    share, groups = _shares(batch, 16)
    dnorm = torch.empty(2, groups, heads, channels, **about) if norm else None
    squeeze, excite, bias = _contiguous(*weights)
    dweights = Gates(*(torch.empty_like(part) for part in (squeeze, excite, bias)))  # type: ignore[arg-type]
    dnorm_weight, dnorm_bias = (torch.empty_like(part) for part in norm[:2]) if norm else (None, None)
    dx = torch.empty_like(x)
    _, sums, hidden = selected[2:]
    with torch.cuda.device_of(x):
        _select_backward[(groups, heads)](
            dgates.contiguous(),
            dscale,
            dshift,
            dpenalty,
            sums,
            hidden,
            selected.gates,
            squeeze,
            excite,
            bias,
            dexcited,
            dhidden,
            dpooled,
            dnorm,
            *(dpenalty.stride() if dpenalty is not None else (0, 0)),
            batch,
            channels,
            pixels,
            heads,
            units,
            share,
            dgates.numel() // selected.gates.numel(),
            0 if dscale is None else len(dscale),
            0 if dscale is None else dscale.stride(0),
            **_row_blocks(channels, units),
            num_warps=4 if channels > 128 else 1,
        )
        layout = Layout.of(x, 64)
        block_w, block_u = 64, 16
        weight_programs = heads * triton.cdiv(channels, block_w) * triton.cdiv(units, block_u)
        ranges = triton.cdiv(channels, layout.block_c)
        share, parts = _shares(batch, triton.cdiv(PROGRAMS, ranges))
        filter_programs = triton.cdiv(filters.numel(), TILE) if sums_filters else 0
        _finish_backward[(weight_programs + filter_programs + ranges * parts,)](
            x,
            dx_conv,
            dx,
            selected.folded,
            norm.weight if norm else None,
            dnorm,
            dnorm_weight,
            dnorm_bias,
            dpooled,
            sums,
            hidden,
            dexcited,
            dhidden,
            *dweights,
            filter_sums if sums_filters else None,
            dfilters if sums_filters else None,
            batch,
            channels,
            pixels,
            heads,
            units,
            share,
            groups * heads,
            weight_programs,
            len(filter_sums),
            filters.numel(),
            filter_programs,
            TRAINING=bool(norm and norm.training),
            **layout.constants,
            BLOCK_W=block_w,
            BLOCK_U=block_u,
            BLOCK_B=32,
            BLOCK_E=16,
            BLOCK_F=TILE,
            num_warps=8,
        )
    return dx, dfilters, dweights, None if norm is None else (dnorm_weight, dnorm_bias)  # type: ignore[return-value]
