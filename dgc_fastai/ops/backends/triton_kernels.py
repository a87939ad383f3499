"""`gated_conv2d` as implicit matrix products on tensor cores, forward and backward, with the gates on the filters.

Su, Fang et al., "Dynamic Group Convolution for Accelerating Convolutional Neural Networks", ECCV 2020, section 3:
every head of every sample scales the input channels by gates of its own. With the norm and the ReLU before it folded
into a scale and a shift per channel,

    u = relu(x * scale + shift), or x
    y[b, j * heads + h] = conv2d(u[b] * gates[b, h], weight[j * heads + h])

A gate belongs to a sample, a head and a channel, so it scales a filter as well as it scales a channel of the input. A
program works on pixels of one sample, and multiplies the tile of the filters that it has loaded by this sample's gates:
one product computes all heads, and x is read once, not once for each of them. Dropped channels are multiplied by zero;
triton_skipping.py has kernels that leave them out.

- Forward: a program per sample, tile of output pixels and tile of outputs; it sums over blocks of channels, and within
  a block over taps, which read nearly the same pixels from the cache.
- Gradients of x, gates, scale and shift: a program per sample, range of channels and some tiles of input pixels. The
  gates' gradients are sums over pixels of u times the gradient of each head's input, so it computes the transposed
  convolution of each head by itself, with filters that are not scaled. That costs no more products than all heads at
  once, and neither reads nor writes more. (A sum over the filters' gradient of each sample would need less of x, but a
  partial sum for each tap, many times as large as x where images are small.)
- Gradient of the weight: a program per tap, tile of outputs and range of channels, which sums over samples, each
  sample's sum scaled by its gates. Where that makes too few programs, the samples are dealt out among several.

Everything is summed in float32, in an order that depends on the shapes only: there are no atomics, so the same input
gives the same bits. Sums over programs are left to whoever uses the gradients, see `Gradients`. Which kernels are
launched, with how many programs, depends on shapes alone, so CUDA graphs can capture them. Products of float32 use TF32
where cuDNN's convolutions may.

A gate of zero removes its channel without a trace, even where it is NaN or Inf. Only the forward pass would leave one,
in its sum over channels, and only then is a result NaN or Inf: the program computes such a tile once more, head by head
with dropped channels masked.

The kernels are made for channels-last images and filters, of which each thread loads 16 bytes at a time; contiguous
ones are read as they are, more slowly. Sizes are arguments, so that layers share what has been compiled; what the
compiler should know about them is their largest power of two, and they are passed in units of it.

So far the kernels have run in Triton's interpreter, which shows that their numbers are right, and have been compiled
for sm_80 and sm_90. Sizes of tiles are guesses: no GPU has timed them.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conv_desc import ConvDesc
from ..precision import convolutions_use_tf32
from .base import Gradients, Norm
from .per_sample import is_channels_last, memory_format

__all__ = ["backward", "forward"]

# How many programs should share the sums over samples and over pixels: a few for each multiprocessor of a large GPU.
PROGRAMS = 512


@triton.jit
def _offset(pixel, channel, pixels, channels, LAST: tl.constexpr):
    """Of a channel of a pixel within an image."""
    if LAST:
        return pixel * channels + channel
    return channel * pixels + pixel


@triton.jit
def filter_offset(output, channel, tap, channels, TAPS: tl.constexpr, LAST: tl.constexpr):
    if LAST:
        return (output * TAPS + tap) * channels + channel
    return (output * channels + channel) * TAPS + tap


@triton.jit
def _under_tap(pixel, tap, sizes, GEOMETRY: tl.constexpr, POINTWISE: tl.constexpr):
    """Which input pixels output pixels read at a tap, and whether these are inside the image."""
    in_height, in_width, out_height, out_width = sizes
    inside = pixel < out_height * out_width
    if POINTWISE:
        return pixel, inside
    KERNEL: tl.constexpr = GEOMETRY[0]
    STRIDE: tl.constexpr = GEOMETRY[1]
    PADDING: tl.constexpr = GEOMETRY[2]
    DILATION: tl.constexpr = GEOMETRY[3]
    y = pixel // out_width * STRIDE[0] - PADDING[0] + tap // KERNEL[1] * DILATION[0]
    x = pixel % out_width * STRIDE[1] - PADDING[1] + tap % KERNEL[1] * DILATION[1]
    return y * in_width + x, inside & (y >= 0) & (y < in_height) & (x >= 0) & (x < in_width)


@triton.jit
def _normalized(x, scale, shift, channel, mask, inside):
    """x [pixels, channels] in float32 after norm and ReLU, zero outside the image as padding is."""
    u = x.to(tl.float32)
    if scale is not None:
        u = u * tl.load(scale + channel, mask, 0.0)[None, :] + tl.load(shift + channel, mask, 0.0)[None, :]
        # A comparison, not a maximum: it keeps NaN, as ReLU does.
        u = tl.where((u <= 0) | ~inside[:, None], 0.0, u)
    return u


@triton.jit
def _convolved(
    x,
    gates,
    scale,
    shift,
    weight,
    pixel,
    output,
    head,
    gate_stride,
    channels,
    outputs,
    sizes,
    HEADS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    POINTWISE: tl.constexpr,
    LAST: tl.constexpr,
    FILTERS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile of the output [pixels, outputs]. MASKED: without the channels that `head` drops, for its outputs."""
    TAPS: tl.constexpr = GEOMETRY[0][0] * GEOMETRY[0][1]
    sums = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for step in range(0, tl.cdiv(channels, BLOCK_C) * TAPS):
        tap = step % TAPS
        channel = step // TAPS * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = channel < channels
        source, inside = _under_tap(pixel, tap, sizes, GEOMETRY, POINTWISE)
        at = _offset(source[:, None], channel[None, :], sizes[0] * sizes[1], channels, LAST)
        values = tl.load(x + at, inside[:, None] & mask[None, :], 0.0)
        u = _normalized(values, scale, shift, channel, mask, inside)
        if MASKED:
            kept = tl.load(gates + head * gate_stride + channel, mask, 0.0) != 0
            u = tl.where(kept[None, :], u, 0.0)
        filled = (output < outputs)[:, None] & mask[None, :]
        at = filter_offset(output[:, None], channel[None, :], tap, channels, TAPS, FILTERS_LAST)
        w = tl.load(weight + at, filled, 0.0)
        gate = tl.load(gates + (output % HEADS)[:, None] * gate_stride + channel[None, :], filled, 0.0)
        w = tl.where(gate != 0, w.to(tl.float32) * gate, 0.0).to(w.dtype)
        sums = tl.dot(u.to(w.dtype), tl.trans(w), sums, input_precision=PRECISION)
    return sums


SIZES = {"batch", "share", "gate_image", "gate_head", "channel_units", "output_units", "filter_units"}
SIZES |= {"in_height", "in_width", "out_height", "out_width", "spans"}


def _jit(function):
    """Compile for no particular sizes, so that another batch, and another layer, finds its kernel compiled."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in SIZES])


@_jit
def _forward(
    x,
    gates,
    scale,
    shift,
    weight,
    y,
    gate_image,
    gate_head,
    channel_units,
    output_units,
    in_height,
    in_width,
    out_height,
    out_width,
    CHANNEL_UNIT: tl.constexpr,
    OUTPUT_UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    POINTWISE: tl.constexpr,
    LAST: tl.constexpr,
    FILTERS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_units * CHANNEL_UNIT
    outputs = output_units * OUTPUT_UNIT
    pixels = out_height * out_width
    # What reads the same pixels runs side by side.
    output_tiles = tl.cdiv(outputs, BLOCK_O)
    program = tl.program_id(0)
    output = program % output_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    program = program // output_tiles
    pixel_tiles = tl.cdiv(pixels, BLOCK_P)
    pixel = program % pixel_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    sample = (program // pixel_tiles).to(tl.int64)

    x += sample * in_height * in_width * channels
    y += sample * pixels * outputs + _offset(pixel[:, None], output[None, :], pixels, outputs, LAST)
    gates += sample * gate_image * channels
    gate_stride = gate_head * channels
    sizes = (in_height, in_width, out_height, out_width)
    mask = (pixel < pixels)[:, None] & (output < outputs)[None, :]
    # fmt: off
    sums = _convolved(
        x, gates, scale, shift, weight, pixel, output, 0, gate_stride, channels, outputs, sizes, HEADS, GEOMETRY,
        POINTWISE, LAST, FILTERS_LAST, PRECISION, BLOCK_P, BLOCK_O, BLOCK_C, False,
    )
    tl.store(y, sums.to(y.dtype.element_ty), mask)
    finite = (tl.abs(sums) < float("inf")).to(tl.int32)
    if tl.min(tl.min(finite, 1), 0) == 0:
        for head in range(0, HEADS):
            sums = _convolved(
                x, gates, scale, shift, weight, pixel, output, head, gate_stride, channels, outputs, sizes, HEADS,
                GEOMETRY, POINTWISE, LAST, FILTERS_LAST, PRECISION, BLOCK_P, BLOCK_O, BLOCK_C, True,
            )
            tl.store(y, sums.to(y.dtype.element_ty), mask & (output % HEADS == head)[None, :])
    # fmt: on


@_jit
def _backward_input(
    grad,
    x,
    gates,
    scale,
    shift,
    weight,
    dx,
    dgates,
    dnorm,
    gate_image,
    gate_head,
    channel_units,
    filter_units,
    in_height,
    in_width,
    out_height,
    out_width,
    spans,
    CHANNEL_UNIT: tl.constexpr,
    FILTER_UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    STEP: tl.constexpr,
    INVERSE: tl.constexpr,
    POINTWISE: tl.constexpr,
    LAST: tl.constexpr,
    FILTERS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dx as x; to be summed are dgates [spans, batch, heads, channels] and dnorm [spans x batch, 2, channels].

    Pixels come in classes, by their position modulo STEP, which is the stride: the taps that reach one pixel reach all
    of its class. They lie STEP apart, and INVERSE, of the dilation modulo STEP, tells the first.
    """
    KERNEL: tl.constexpr = GEOMETRY[0]
    STRIDE: tl.constexpr = GEOMETRY[1]
    PADDING: tl.constexpr = GEOMETRY[2]
    DILATION: tl.constexpr = GEOMETRY[3]
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    channels = channel_units * CHANNEL_UNIT
    outputs = filter_units * FILTER_UNIT * HEADS
    filters = filter_units * FILTER_UNIT
    pixels = in_height * in_width
    ranges = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    channel = program % ranges * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // ranges
    span = program % spans
    sample = (program // spans).to(tl.int64)
    batch = tl.num_programs(0) // (ranges * spans)
    mask = channel < channels

    x += sample * pixels * channels
    dx += sample * pixels * channels
    grad += sample * out_height * out_width * outputs
    head = tl.arange(0, BLOCK_H)
    gated = (head < HEADS)[:, None] & mask[None, :]
    gates += (sample * gate_image + head[:, None] * gate_head) * channels + channel[None, :]
    gate = tl.load(gates, gated, 0.0)
    gate_sums = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    scale_sums = tl.zeros([BLOCK_C], tl.float32)
    shift_sums = tl.zeros([BLOCK_C], tl.float32)

    rows = tl.cdiv(in_height, STEP[0])
    columns = tl.cdiv(in_width, STEP[1])
    tiles = tl.cdiv(rows * columns, BLOCK_P)
    all_tiles = tiles * STEP[0] * STEP[1]
    for tile in range(span * all_tiles // spans, (span + 1) * all_tiles // spans):
        place = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        first_row = tile // tiles // STEP[1]
        first_column = tile // tiles % STEP[1]
        if POINTWISE:
            row = 0
            column = place
        else:
            row = place // columns * STEP[0] + first_row
            column = place % columns * STEP[1] + first_column
        pixel = row * in_width + column
        inside = (place < rows * columns) & (row < in_height) & ((column < in_width) | POINTWISE)
        top = (first_row + PADDING[0]) * INVERSE[0] % STEP[0]
        left = (first_column + PADDING[1]) * INVERSE[1] % STEP[1]
        down = tl.maximum(tl.cdiv(KERNEL[0] - top, STEP[0]), 0)
        across = tl.maximum(tl.cdiv(KERNEL[1] - left, STEP[1]), 0)

        # The gradient of each head's input before its gates: [heads, pixels, channels], one product for each head.
        if BLOCK_H == 1:
            parts = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        else:
            parts = tl.zeros([BLOCK_H, BLOCK_P, BLOCK_C], tl.float32)
        for step in range(0, tl.cdiv(filters, BLOCK_F) * down * across):
            filter_ = step // (down * across) * BLOCK_F + tl.arange(0, BLOCK_F)
            tap_row = top + step % (down * across) // across * STEP[0]
            tap_column = left + step % (down * across) % across * STEP[1]
            output = filter_[None, :] * HEADS + head[:, None]
            filled = (filter_ < filters)[None, :] & (head < HEADS)[:, None]
            if POINTWISE:
                reader = pixel
                reads = inside
            else:
                y = row + PADDING[0] - tap_row * DILATION[0]
                z = column + PADDING[1] - tap_column * DILATION[1]
                reads = inside & (y >= 0) & (z >= 0) & (y % STRIDE[0] == 0) & (z % STRIDE[1] == 0)
                y = y // STRIDE[0]
                z = z // STRIDE[1]
                reads = reads & (y < out_height) & (z < out_width)
                reader = y * out_width + z
            if BLOCK_H == HEADS:
                near = step // (down * across) * BLOCK_F * HEADS + tl.arange(0, BLOCK_F * BLOCK_H)
                read = _offset(reader[:, None], near[None, :], out_height * out_width, outputs, LAST)
                g = tl.load(grad + read, reads[:, None] & (near < outputs)[None, :], 0.0)
                g = tl.permute(tl.reshape(g, [BLOCK_P, BLOCK_F, BLOCK_H]), [2, 0, 1])
            else:
                read = _offset(reader[None, :, None], output[:, None, :], out_height * out_width, outputs, LAST)
                g = tl.load(grad + read, reads[None, :, None] & filled[:, None, :], 0.0)
            tap = tap_row * KERNEL[1] + tap_column
            read = filter_offset(output[:, :, None], channel[None, None, :], tap, channels, TAPS, FILTERS_LAST)
            w = tl.load(weight + read, filled[:, :, None] & mask[None, None, :], 0.0)
            if BLOCK_H == 1:
                g = tl.reshape(g, [BLOCK_P, BLOCK_F])
                w = tl.reshape(w, [BLOCK_F, BLOCK_C])
            parts = tl.dot(g, w, parts, input_precision=PRECISION)

        parts = tl.reshape(parts, [BLOCK_H, BLOCK_P, BLOCK_C])
        owned = inside[:, None] & mask[None, :]
        at = _offset(pixel[:, None], channel[None, :], pixels, channels, LAST)
        values = tl.load(x + at, owned, 0.0)
        u = _normalized(values, scale, shift, channel, mask, inside)
        gate_sums += tl.sum(parts * u[None, :, :], 1)
        du = tl.sum(tl.where(gate[:, None, :] != 0, parts * gate[:, None, :], 0.0), 0)
        if scale is not None:
            passed = (u > 0) & (du != 0)  # what is dropped by all heads leaves no trace, even if it is NaN
            du = tl.where(passed, du, 0.0)
            scale_sums += tl.sum(tl.where(passed, du * values.to(tl.float32), 0.0), 0)
            shift_sums += tl.sum(du, 0)
            du = tl.where(passed, du * tl.load(scale + channel, mask, 0.0)[None, :], 0.0)
        tl.store(dx + at, du.to(dx.dtype.element_ty), owned)

    dgates += ((span * batch + sample) * HEADS + head[:, None]) * channels + channel[None, :]
    tl.store(dgates, tl.where(gate != 0, gate_sums, 0.0), gated)
    if scale is not None:
        dnorm += (span * batch + sample) * 2 * channels
        tl.store(dnorm + channel, scale_sums, mask)
        tl.store(dnorm + channels + channel, shift_sums, mask)


@triton.jit
def _product(
    grad,
    x,
    scale,
    shift,
    pixel,
    channel,
    output,
    tap,
    channels,
    outputs,
    sizes,
    sums,
    GEOMETRY: tl.constexpr,
    POINTWISE: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums [outputs, channels] and what some pixels add to the gradient of the filters at a tap."""
    in_height, in_width, out_height, out_width = sizes
    mask = channel < channels
    source, inside = _under_tap(pixel, tap, sizes, GEOMETRY, POINTWISE)
    at = _offset(source[:, None], channel[None, :], in_height * in_width, channels, LAST)
    values = tl.load(x + at, inside[:, None] & mask[None, :], 0.0)
    u = _normalized(values, scale, shift, channel, mask, inside)
    at = _offset(pixel[None, :], output[:, None], out_height * out_width, outputs, LAST)
    g = tl.load(grad + at, (pixel < out_height * out_width)[None, :] & (output < outputs)[:, None], 0.0)
    return tl.dot(g, u.to(g.dtype), sums, input_precision=PRECISION)


@_jit
def _backward_weight(
    grad,
    x,
    gates,
    scale,
    shift,
    dweight,
    batch,
    share,
    gate_image,
    gate_head,
    channel_units,
    output_units,
    in_height,
    in_width,
    out_height,
    out_width,
    CHANNEL_UNIT: tl.constexpr,
    OUTPUT_UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    POINTWISE: tl.constexpr,
    LAST: tl.constexpr,
    FILTERS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight [parts, *weight], to be summed over parts; each part has `share` samples. ONE_TILE: of pixels."""
    TAPS: tl.constexpr = GEOMETRY[0][0] * GEOMETRY[0][1]
    channels = channel_units * CHANNEL_UNIT
    outputs = output_units * OUTPUT_UNIT
    sizes = (in_height, in_width, out_height, out_width)
    program = tl.program_id(0)
    tap = program % TAPS
    program = program // TAPS
    ranges = tl.cdiv(channels, BLOCK_C)
    channel = program % ranges * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // ranges
    output_tiles = tl.cdiv(outputs, BLOCK_O)
    output = program % output_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    part = program // output_tiles
    mask = (output < outputs)[:, None] & (channel < channels)[None, :]
    pixel = tl.arange(0, BLOCK_P)

    gates += (output % HEADS)[:, None] * gate_head * channels + channel[None, :]
    total = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for sample in range(part * share, tl.minimum(part * share + share, batch)):
        image = x + tl.cast(sample, tl.int64) * in_height * in_width * channels
        image_grad = grad + tl.cast(sample, tl.int64) * out_height * out_width * outputs
        sums = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
        # fmt: off
        if ONE_TILE:  # without a loop within, the compiler loads the next sample while it computes this one
            sums = _product(
                image_grad, image, scale, shift, pixel, channel, output, tap, channels, outputs, sizes, sums,
                GEOMETRY, POINTWISE, LAST, PRECISION,
            )
        else:
            for start in range(0, out_height * out_width, BLOCK_P):
                sums = _product(
                    image_grad, image, scale, shift, start + pixel, channel, output, tap, channels, outputs, sizes,
                    sums, GEOMETRY, POINTWISE, LAST, PRECISION,
                )
        # fmt: on
        gate = tl.load(gates + sample * gate_image * channels, mask, 0.0)
        total += tl.where(gate != 0, sums * gate, 0.0)
    dweight += tl.cast(part, tl.int64) * outputs * channels * TAPS
    at = filter_offset(output[:, None], channel[None, :], tap, channels, TAPS, FILTERS_LAST)
    tl.store(dweight + at, total.to(dweight.dtype.element_ty), mask)


def _block(size: int, most: int) -> int:
    """The power of two that holds `size`, but at least the 16 that `tl.dot` needs and no more than `most`."""
    return max(16, min(most, triton.next_power_of_2(size)))


def unit(size: int) -> int:
    """The largest power of two that divides a size; 16 tells the compiler as much as more would."""
    return gcd(size, 16)


def _laid_out(tensor: Tensor) -> Tensor:
    """The tensor, channels-last or contiguous."""
    return tensor.contiguous(memory_format=memory_format(tensor))


def _with_channels_side_by_side(gates: Tensor) -> Tensor:
    """The gates, if the strides of samples and heads are multiples of the number of channels; else a copy."""
    channels = gates.shape[2]
    whole = gates.stride(2) == 1 and gates.stride(0) % channels == gates.stride(1) % channels == 0
    return gates if whole else gates.contiguous()


def _pair(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.scale.contiguous(), norm.shift.contiguous())


def precision() -> str:
    """Of products of float32."""
    return "tf32" if convolutions_use_tf32() else "ieee"


def _arguments(desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor) -> dict:
    """What the three kernels share."""
    channel_unit = unit(desc.channels)
    return {
        "gate_image": gates.stride(0) // desc.channels,
        "gate_head": gates.stride(1) // desc.channels,
        "channel_units": desc.channels // channel_unit,
        "in_height": desc.in_size[0],
        "in_width": desc.in_size[1],
        "out_height": desc.out_size[0],
        "out_width": desc.out_size[1],
        "CHANNEL_UNIT": channel_unit,
        "HEADS": desc.heads,
        "GEOMETRY": tuple(map(tuple, (desc.kernel_size, desc.stride, desc.padding, desc.dilation))),
        "POINTWISE": desc.is_pointwise and tuple(desc.stride) == (1, 1),
        "LAST": is_channels_last(x),
        "FILTERS_LAST": is_channels_last(weight),
        "PRECISION": precision(),
    }


def forward(desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None) -> Tensor:
    """y [B, O, H', W'] of x [B, C, H, W], gates [B, heads, C] and weight [O, C, kh, kw].

    x and weight share one type, bfloat16, float16 or float32; gates and norm are float32. The output is channels-last
    where the input is.
    """
    x, weight, gates = _laid_out(x), _laid_out(weight), _with_channels_side_by_side(gates)
    y = torch.empty(desc.output_shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    outputs, pixels = desc.heads * desc.filters, desc.out_size[0] * desc.out_size[1]
    exact = x.dtype == torch.float32
    block_p, block_o = _block(pixels, 64 if exact else 128), _block(outputs, 64)
    programs = desc.batch * triton.cdiv(pixels, block_p) * triton.cdiv(outputs, block_o)
    if not programs:
        return y
    with torch.cuda.device_of(x):
        _forward[(programs,)](
            x,
            gates,
            *_pair(norm),
            weight,
            y,
            output_units=outputs // unit(outputs),
            OUTPUT_UNIT=unit(outputs),
            **_arguments(desc, x, gates, weight),
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCK_C=_block(desc.channels, 32),
            num_warps=8 if block_p * block_o >= (4096 if exact else 8192) else 4,
        )
    return y


def backward(desc: ConvDesc, grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None) -> Gradients:
    """Gradients from grad [B, O, H', W'], which may have any strides; all but that of x are parts of sums, see
    `Gradients`.

    A gate of zero has no gradient, and its channel adds nothing to the others for that sample and head.
    """
    x, weight, gates = _laid_out(x), _laid_out(weight), _with_channels_side_by_side(gates)
    grad = grad.contiguous(memory_format=memory_format(x))
    with torch.cuda.device_of(x):
        shared = _arguments(desc, x, gates, weight)
        dx, dgates, dnorm = _input_gradients(desc, grad, x, gates, weight, norm, shared)
        dweight = _weight_gradient(desc, grad, x, gates, weight, norm, shared)
    return Gradients(dx, dgates, dweight, *((None, None) if dnorm is None else dnorm.unbind(1)))


def _input_gradients(desc, grad, x, gates, weight, norm, shared) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of x, and to be summed over the first dimension [parts, B, heads, C] of the gates and [parts, 2, C] of scale and
    shift."""
    exact = x.dtype == torch.float32
    step = tuple(s if gcd(s, d) == 1 else 1 for s, d in zip(desc.stride, desc.dilation))
    area = triton.cdiv(desc.in_size[0], step[0]) * triton.cdiv(desc.in_size[1], step[1])
    # Each warp has the sums of a head, which find room in its registers.
    block_h, block_c = triton.next_power_of_2(desc.heads), _block(desc.channels, 64 if desc.heads == 1 else 32)
    warps = 8 if block_h == 1 else min(8, block_h)
    block_p = _block(area, (512 if exact or block_h == 1 else 1024) * warps // (block_h * block_c))
    ranges, tiles = triton.cdiv(desc.channels, block_c), triton.cdiv(area, block_p) * step[0] * step[1]
    spans = max(1, min(tiles, triton.cdiv(PROGRAMS, max(1, desc.batch * ranges))))
    dx = torch.empty_like(x)
    dgates = gates.new_empty(spans, *gates.shape)
    dnorm = None if norm is None else gates.new_empty(spans * desc.batch, 2, desc.channels)
    if dx.numel():
        _backward_input[(desc.batch * spans * ranges,)](
            grad,
            x,
            gates,
            *_pair(norm),
            weight,
            dx,
            dgates,
            dnorm,
            filter_units=desc.filters // unit(desc.filters),
            FILTER_UNIT=unit(desc.filters),
            spans=spans,
            **shared,
            STEP=step,
            INVERSE=tuple(pow(d, -1, s) if s > 1 else 0 for s, d in zip(step, desc.dilation)),
            BLOCK_H=block_h,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            BLOCK_F=_block(desc.filters, 16 if exact else 32),
            num_warps=warps,
        )
    return dx, dgates, dnorm


def _weight_gradient(desc, grad, x, gates, weight, norm, shared) -> Tensor:
    """In parts, as `Gradients` says."""
    outputs, pixels, taps = desc.heads * desc.filters, grad.shape[2] * grad.shape[3], weight[0, 0].numel()
    block_o, block_c = _block(outputs, 64), _block(desc.channels, 64)
    block_p = _block(pixels, 32 if x.dtype == torch.float32 else 64)
    programs = triton.cdiv(outputs, block_o) * triton.cdiv(desc.channels, block_c) * taps
    share = triton.cdiv(max(desc.batch, 1), min(max(desc.batch, 1), triton.cdiv(PROGRAMS, programs)))
    parts = triton.cdiv(max(desc.batch, 1), share)
    partial = gates.new_empty(parts, weight.numel())
    _backward_weight[(parts * programs,)](
        grad,
        x,
        gates,
        *_pair(norm),
        partial,
        batch=desc.batch,
        share=share,
        output_units=outputs // unit(outputs),
        OUTPUT_UNIT=unit(outputs),
        **shared,
        ONE_TILE=pixels <= block_p,
        BLOCK_P=block_p,
        BLOCK_O=block_o,
        BLOCK_C=block_c,
        num_warps=8 if x.dtype == torch.float32 else 4,
    )
    return partial
