"""`gated_conv2d` as Triton kernels, forward and backward, which skip the channels that the gates drop.

Su, Fang et al., "Dynamic Group Convolution for Accelerating Convolutional Neural Networks", ECCV 2020, section 3:
every head of every sample looks at input channels of its own, so neither a dense convolution nor a grouped one does
what the method saves. With the norm and the ReLU before it folded into a scale and a shift per channel,

    u = relu(x * scale + shift), or x
    y[b, j * heads + h] = conv2d(u[b] * gates[b, h], weight[j * heads + h])

A small kernel lists, for each sample and head, the channels whose gates are not zero. The other kernels loop over
these lists and gather rows of the input and of the weights by them; norm, ReLU and gate are applied to what was
loaded, so that no altered copy of the input is ever written. Padding comes after the ReLU: it is zero.

- Forward: a program per sample, head, tile of up to 256 output pixels, with all filters of the head up to 128; it sums
  over blocks of kept channels, and within a block over taps, which read nearly the same pixels from the cache (Triton
  has no way to read a tile with its border once and shift it).
- Gradients of x, gates, scale and shift: a program per sample, tile of input pixels and range of channels. A list is
  in ascending order, so what a head keeps within a range is one piece of its list. For that piece the program
  computes the transposed convolution, then moves its rows to where their channels are and adds them up over heads.
- Gradient of the weight: a program per head, tile of its filters, range of channels and tap, which sums over samples
  in the same way. Where that makes too few programs, the samples are dealt out among several times as many.

The filters are packed [heads, C, kh, kw, O / heads] first, so that those of a kept channel lie side by side.

No two programs write to the same place and there are no atomics: the same input gives the same bits. Sums over
programs (gates, scale, shift, weight) are left to whoever uses the gradients, see `Gradients`.

Products of float32 use TF32 where cuDNN's convolutions may; everything is summed in float32.
Offsets within one image plane and within the weight must fit 32 bits; all others may take 64. With a stride above
one, the gradient of x does more work than it needs: it tries every tap at every pixel and masks what does not meet.

So far the kernels have run in Triton's interpreter only, which shows that their numbers are right, and have been
compiled for sm_90 (Hopper). On a GPU they have neither run nor been timed; block sizes are guesses made for Hopper.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conv_desc import conv_desc
from .per_sample import is_channels_last, memory_format
from .triton_kernels import filter_offset, precision, unit

__all__ = ["backward", "forward"]

# How many programs should share the gradient of the weight: a few for each multiprocessor of a large GPU.
PROGRAMS = 512


@triton.jit
def _list_kept(gates, kept, before, channels, BLOCK: tl.constexpr):
    """For one row of gates: the kept channels in ascending order, and how many come before each channel.

    gates, kept [rows, channels]; before [rows, channels + 1], whose last column counts the whole row.
    """
    row = tl.program_id(0)
    seen = 0
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        mask = channel < channels
        keep = (tl.load(gates + row * channels + channel, mask, 0.0) != 0).to(tl.int32)
        place = seen + tl.cumsum(keep) - keep
        tl.store(kept + row * channels + place, channel, mask & (keep != 0))
        tl.store(before + row * (channels + 1) + channel, place, mask)
        seen += tl.sum(keep)
    tl.store(before + row * (channels + 1) + channels, seen)


@triton.jit
def _load(pointers, mask, ACROSS: tl.constexpr):
    """Load a tile [channels, pixels]. ACROSS: adjacent threads read adjacent channels instead of adjacent pixels."""
    if ACROSS:
        return tl.trans(tl.load(tl.trans(pointers), tl.trans(mask), 0.0))
    return tl.load(pointers, mask, 0.0)


@triton.jit
def _store(pointers, values, mask, ACROSS: tl.constexpr):
    if ACROSS:
        tl.store(tl.trans(pointers), tl.trans(values), tl.trans(mask))
    else:
        tl.store(pointers, values, mask)


@triton.jit
def _plane(pixel, width, strides, FLAT: tl.constexpr):
    """Offsets of pixels within a plane. FLAT planes need no division, and the compiler sees what is adjacent."""
    if FLAT:
        return pixel * strides[3]
    return pixel // width * strides[2] + pixel % width * strides[3]


@triton.jit
def _under_tap(
    pixel,
    tap,
    out_size,
    in_size,
    strides,
    PLAIN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):
    """Where output pixels read the input at a tap: offsets, and which of them are inside the image."""
    inside = pixel < out_size[0] * out_size[1]
    if PLAIN:
        return pixel * strides[3], inside
    y = pixel // out_size[1] * STRIDE[0] - PADDING[0] + tap // KERNEL[1] * DILATION[0]
    x = pixel % out_size[1] * STRIDE[1] - PADDING[1] + tap % KERNEL[1] * DILATION[1]
    inside = inside & (y >= 0) & (y < in_size[0]) & (x >= 0) & (x < in_size[1])
    return y * strides[2] + x * strides[3], inside


@triton.jit
def _reached_by_tap(
    pixel,
    tap,
    out_size,
    in_size,
    strides,
    PLAIN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):
    """The inverse: which output pixel reads each input pixel at a tap (offsets), and whether there is one."""
    inside = pixel < in_size[0] * in_size[1]
    if PLAIN:
        return pixel * strides[3], inside
    y = pixel // in_size[1] + PADDING[0] - tap // KERNEL[1] * DILATION[0]
    x = pixel % in_size[1] + PADDING[1] - tap % KERNEL[1] * DILATION[1]
    inside = inside & (y >= 0) & (x >= 0) & (y % STRIDE[0] == 0) & (x % STRIDE[1] == 0)
    y, x = y // STRIDE[0], x // STRIDE[1]
    inside = inside & (y < out_size[0]) & (x < out_size[1])
    return y * strides[2] + x * strides[3], inside


@triton.jit
def _normalized(x, scale, shift, channel, mask, inside):
    """x [channels, pixels] in float32 after norm and ReLU, zero outside the image as padding is."""
    x = x.to(tl.float32)
    if scale is not None:
        x = x * tl.load(scale + channel, mask, 0.0)[:, None] + tl.load(shift + channel, mask, 0.0)[:, None]
        # A comparison, not a maximum: it keeps NaN, as ReLU does.
        x = tl.where((x <= 0) | ~inside, 0.0, x)
    return x


@triton.jit
def _spread(rows, place):
    """Row place[c] of rows [R, N] for each channel c: [channels, N]; zeros where there is no such row."""
    here = (place >= 0) & (place < rows.shape[0])
    index = tl.broadcast_to(tl.where(here, place, 0)[:, None], [place.shape[0], rows.shape[1]])
    return tl.where(here[:, None], tl.gather(rows, index, 0), 0.0)


@triton.jit
def _filters(weight, head, channel, tap, filter_, channels, filters, live, TAPS: tl.constexpr):
    """A tile [channels, filters] of the packed filters."""
    at = ((head * channels + channel[:, None]) * TAPS + tap) * filters + filter_[None, :]
    return tl.load(weight + at, live[:, None] & (filter_ < filters)[None, :], 0.0)


@triton.jit
def _forward(
    x,
    kept,
    before,
    gates,
    scale,
    shift,
    weight,
    y,
    x_strides,
    y_strides,
    in_size,
    out_size,
    heads,
    channels,
    filter_units,
    FILTER_UNIT: tl.constexpr,
    PLAIN: tl.constexpr,
    ACROSS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    filters = filter_units * FILTER_UNIT
    # What reads the same pixels runs side by side: filter tiles, then heads, then pixel tiles, then samples.
    filter_tiles = tl.cdiv(filters, BLOCK_F)
    program = tl.program_id(0)
    filter_ = program % filter_tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    program = program // filter_tiles
    head = program % heads
    program = program // heads
    pixel_tiles = tl.cdiv(out_size[0] * out_size[1], BLOCK_P)
    pixel = program % pixel_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    sample = program // pixel_tiles

    row = sample * heads + head
    count = tl.load(before + row * (channels + 1) + channels)
    output = filter_ * heads + head
    x += tl.cast(sample, tl.int64) * x_strides[0]
    sums = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
    for step in range(0, tl.cdiv(count, BLOCK_K) * TAPS):
        tap = step % TAPS
        place = step // TAPS * BLOCK_K + tl.arange(0, BLOCK_K)
        live = place < count
        channel = tl.load(kept + row * channels + place, live, 0)
        gate = tl.load(gates + row * channels + channel, live, 0.0)

        offset, inside = _under_tap(pixel, tap, out_size, in_size, x_strides, PLAIN, KERNEL, STRIDE, PADDING, DILATION)
        inside = live[:, None] & inside[None, :]
        u = _load(x + channel.to(tl.int64)[:, None] * x_strides[1] + offset[None, :], inside, ACROSS)
        u = _normalized(u, scale, shift, channel, live, inside) * gate[:, None]
        w = _filters(weight, head, channel, tap, filter_, channels, filters, live, TAPS)
        sums = tl.dot(tl.trans(u.to(w.dtype)), w, sums, input_precision=PRECISION)

    y += tl.cast(sample, tl.int64) * y_strides[0]
    y += output.to(tl.int64)[None, :] * y_strides[1] + (pixel * y_strides[3])[:, None]  # its planes are flat
    mask = (pixel < out_size[0] * out_size[1])[:, None] & (filter_ < filters)[None, :]
    tl.store(y, sums.to(y.dtype.element_ty), mask)


@triton.jit
def _kept_within(before, gates, row, channels, start, stop, channel, mask):
    """What a head keeps of the channels from start to stop: a piece of its list, first to last, the gates of these
    channels, and each one's place in the list, -1 if it is dropped."""
    first = tl.load(before + row * (channels + 1) + start)
    last = tl.load(before + row * (channels + 1) + stop)
    gate = tl.load(gates + row * channels + channel, mask, 0.0)
    place = tl.where(gate != 0, tl.load(before + row * (channels + 1) + channel, mask, 0), -1)
    return first, last, gate, place


@triton.jit(do_not_specialize=["batch"])
def _backward_input(
    grad,
    x,
    kept,
    before,
    gates,
    scale,
    shift,
    weight,
    dx,
    dgates,
    dscale,
    dshift,
    grad_strides,
    x_strides,
    dx_strides,
    in_size,
    out_size,
    batch,
    heads,
    channels,
    filter_units,
    FILTER_UNIT: tl.constexpr,
    PLAIN: tl.constexpr,
    FLAT: tl.constexpr,
    GRAD_ACROSS: tl.constexpr,
    ACROSS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dx as x; to be summed are dgates [tiles, batch, heads, channels] and dscale, dshift [tiles x batch, channels]."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    filters = filter_units * FILTER_UNIT
    ranges = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    start = program % ranges * BLOCK_C
    stop = tl.minimum(start + BLOCK_C, channels)
    program = program // ranges
    pixel_tiles = tl.cdiv(in_size[0] * in_size[1], BLOCK_P)
    tile = program % pixel_tiles
    sample = program // pixel_tiles

    channel = start + tl.arange(0, BLOCK_C)
    mask = channel < channels
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    owned = mask[:, None] & (pixel < in_size[0] * in_size[1])[None, :]
    x += tl.cast(sample, tl.int64) * x_strides[0] + channel.to(tl.int64)[:, None] * x_strides[1]
    x += _plane(pixel, in_size[1], x_strides, FLAT)[None, :]
    values = _load(x, owned, ACROSS)
    u = _normalized(values, scale, shift, channel, mask, owned)

    grad += tl.cast(sample, tl.int64) * grad_strides[0]
    du = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for head in range(0, heads):
        row = sample * heads + head
        first, last, gate, place = _kept_within(before, gates, row, channels, start, stop, channel, mask)
        scaled = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)  # gradient of this head's scaled input
        for begin in range(first, last, BLOCK_R):
            live = begin + tl.arange(0, BLOCK_R) < last
            chosen = tl.load(kept + row * channels + begin + tl.arange(0, BLOCK_R), live, 0)
            rows = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
            for step in range(0, tl.cdiv(filters, BLOCK_F) * TAPS):
                tap = step % TAPS
                filter_ = step // TAPS * BLOCK_F + tl.arange(0, BLOCK_F)
                output = filter_ * heads + head
                offset, inside = _reached_by_tap(
                    pixel, tap, out_size, in_size, grad_strides, PLAIN, KERNEL, STRIDE, PADDING, DILATION
                )
                g = _load(
                    grad + output.to(tl.int64)[:, None] * grad_strides[1] + offset[None, :],
                    (filter_ < filters)[:, None] & inside[None, :],
                    GRAD_ACROSS,
                )
                w = _filters(weight, head, chosen, tap, filter_, channels, filters, live, TAPS)
                rows = tl.dot(w, g, rows, input_precision=PRECISION)
            scaled += _spread(rows, place - begin)
        # Where a gate is zero, u may be anything, even NaN, and must leave no trace.
        dgate = tl.where(gate != 0, tl.sum(u * scaled, 1), 0.0)
        tl.store(dgates + (tl.cast(tile, tl.int64) * batch * heads + row) * channels + channel, dgate, mask)
        du += scaled * gate[:, None]

    if scale is not None:
        active = (u > 0) & (du != 0)
        du = tl.where(active, du, 0.0)
        partial = (tl.cast(tile, tl.int64) * batch + sample) * channels + channel
        tl.store(dscale + partial, tl.sum(tl.where(active, du * values.to(tl.float32), 0.0), 1), mask)
        tl.store(dshift + partial, tl.sum(du, 1), mask)
        du = tl.where(active, du * tl.load(scale + channel, mask, 0.0)[:, None], 0.0)
    dx += tl.cast(sample, tl.int64) * dx_strides[0] + channel.to(tl.int64)[:, None] * dx_strides[1]
    dx += _plane(pixel, in_size[1], dx_strides, FLAT)[None, :]
    _store(dx, du.to(dx.dtype.element_ty), owned, ACROSS)


@triton.jit(do_not_specialize=["batch", "share"])
def _backward_weight(
    grad,
    x,
    kept,
    before,
    gates,
    scale,
    shift,
    dweight,
    grad_strides,
    x_strides,
    in_size,
    out_size,
    batch,
    share,
    heads,
    channels,
    filter_units,
    FILTER_UNIT: tl.constexpr,
    PLAIN: tl.constexpr,
    FLAT: tl.constexpr,
    GRAD_ACROSS: tl.constexpr,
    ACROSS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FILTERS_LAST: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dweight [parts, *weight], to be summed over parts; each part has `share` samples."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    filters = filter_units * FILTER_UNIT
    ranges = tl.cdiv(channels, BLOCK_C)
    filter_tiles = tl.cdiv(filters, BLOCK_F)
    program = tl.program_id(0)
    tap = program % TAPS
    program = program // TAPS
    start = program % ranges * BLOCK_C
    stop = tl.minimum(start + BLOCK_C, channels)
    program = program // ranges
    filter_ = program % filter_tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    program = program // filter_tiles
    head = program % heads
    part = program // heads

    channel = start + tl.arange(0, BLOCK_C)
    mask = channel < channels
    output = filter_ * heads + head
    pixels = out_size[0] * out_size[1]
    sums = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    for sample in range(part * share, tl.minimum(part * share + share, batch)):
        row = sample * heads + head
        first, last, gate, place = _kept_within(before, gates, row, channels, start, stop, channel, mask)
        x_rows = x + tl.cast(sample, tl.int64) * x_strides[0]
        grad_rows = grad + tl.cast(sample, tl.int64) * grad_strides[0]
        grad_rows += output.to(tl.int64)[:, None] * grad_strides[1]
        for begin in range(first, last, BLOCK_R):
            live = begin + tl.arange(0, BLOCK_R) < last
            chosen = tl.load(kept + row * channels + begin + tl.arange(0, BLOCK_R), live, 0)
            chosen_rows = x_rows + chosen.to(tl.int64)[:, None] * x_strides[1]
            rows = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
            for corner in range(0, pixels, BLOCK_P):
                pixel = corner + tl.arange(0, BLOCK_P)
                offset, inside = _under_tap(
                    pixel, tap, out_size, in_size, x_strides, PLAIN, KERNEL, STRIDE, PADDING, DILATION
                )
                inside = live[:, None] & inside[None, :]
                u = _load(chosen_rows + offset[None, :], inside, ACROSS)
                u = _normalized(u, scale, shift, chosen, live, inside)
                g = _load(
                    grad_rows + _plane(pixel, out_size[1], grad_strides, FLAT)[None, :],
                    (filter_ < filters)[:, None] & (pixel < pixels)[None, :],
                    GRAD_ACROSS,
                )
                rows = tl.dot(u.to(g.dtype), tl.trans(g), rows, input_precision=PRECISION)
            sums += _spread(rows, place - begin) * gate[:, None]
    dweight += tl.cast(part, tl.int64) * TAPS * filters * heads * channels
    dweight += filter_offset(output[None, :], channel[:, None], tap, channels, TAPS, FILTERS_LAST)
    _store(dweight, sums, mask[:, None] & (filter_ < filters)[None, :], True)


def _block(size: int, most: int) -> int:
    """The power of two that holds `size`, but at least the 16 that `tl.dot` needs and no more than `most`."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _warps(load: int) -> int:
    """Enough warps that the compiler finds registers for all of a tile; `load` is its size, weighted by the kernel."""
    return 8 if load > 4096 else 4


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def list_kept(gates: Tensor) -> tuple[Tensor, Tensor]:
    """The kept channels of each sample and head, and how many come before each channel: see `_list_kept`."""
    batch, heads, channels = gates.shape
    kept = torch.empty(gates.shape, dtype=torch.int32, device=gates.device)
    before = torch.empty((batch, heads, channels + 1), dtype=torch.int32, device=gates.device)
    _list_kept[(batch * heads,)](gates, kept, before, channels, BLOCK=_block(channels, 1024))
    return kept, before


def _packed(weight: Tensor, heads: int) -> Tensor:
    """[heads, C, kh, kw, O / heads], in which the filters of a head are side by side for each channel."""
    return weight.unflatten(0, (-1, heads)).permute(1, 2, 3, 4, 0).contiguous()


def _flat(image: Tensor) -> bool:
    """Whether one stride leads from each pixel of a plane to the next, through all rows."""
    return image.shape[2] == 1 or image.stride(2) == image.shape[3] * image.stride(3)


def _geometry(kernel, stride, padding, dilation, flat: bool) -> dict:
    """What all kernels are specialized for. PLAIN: output pixel p reads input pixel p and no other."""
    return {
        "PLAIN": flat and tuple(kernel) == tuple(stride) == (1, 1) and tuple(padding) == (0, 0),
        "KERNEL": tuple(kernel),
        "STRIDE": tuple(stride),
        "PADDING": tuple(padding),
        "DILATION": tuple(dilation),
        "PRECISION": precision(),
    }


def _across(image: Tensor) -> bool:
    return image.stride(1) == 1


def forward(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """y [B, O, H', W'] of x [B, C, H, W], gates [B, heads, C] and weight [O, C, kh, kw].

    x and weight share one type, bfloat16, float16 or float32; gates, scale and shift are float32. scale and shift
    [C] are both given or both None. Output is channels-last where x is.
    """
    batch, channels, *in_size = x.shape
    heads, kernel = gates.shape[1], weight.shape[2:]
    filters = weight.shape[0] // heads
    shape = conv_desc(x.shape, weight.shape, heads, stride, padding, dilation).output_shape
    out_size = shape[2:]
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    exact = x.dtype == torch.float32
    block_f = _block(filters, 64 if exact else 128)  # all of a head, mostly
    block_p = _block(out_size[0] * out_size[1], (4096 if exact else 8192) // max(32, block_f))
    programs = batch * heads * triton.cdiv(out_size[0] * out_size[1], block_p) * triton.cdiv(filters, block_f)
    with torch.cuda.device_of(x):
        gates, scale, shift = _contiguous(gates, scale, shift)  # type: ignore[assignment]
        _forward[(programs,)](
            x,
            *list_kept(gates),
            gates,
            scale,
            shift,
            _packed(weight, heads),
            y,
            x.stride(),
            y.stride(),
            tuple(in_size),
            tuple(out_size),
            heads,
            channels,
            filters // unit(filters),
            unit(filters),
            **_geometry(kernel, stride, padding, dilation, _flat(x)),
            ACROSS=_across(x),
            BLOCK_F=block_f,
            BLOCK_P=block_p,
            BLOCK_K=_block(channels, 16 if exact else 32),
            num_warps=8 if block_f * block_p > 2048 else 4,
        )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, gates, weight, scale and shift from grad [B, O, H', W'], which may have any strides.

    A gate of zero has no gradient, and its channel adds nothing to the others for that sample and head.
    """
    batch, channels, *in_size = x.shape
    heads, outputs, kernel = gates.shape[1], weight.shape[0], weight.shape[2:]
    filters, taps, out_size = outputs // heads, kernel.numel(), tuple(grad.shape[2:])
    exact = x.dtype == torch.float32
    block_c, block_p, block_f = (
        _block(channels, 64),
        _block(in_size[0] * in_size[1], 32 if exact else 64),
        _block(filters, 64),
    )
    ranges, tiles = triton.cdiv(channels, block_c), triton.cdiv(in_size[0] * in_size[1], block_p)
    weight = weight.contiguous(memory_format=memory_format(weight))
    with torch.cuda.device_of(x):
        gates, scale, shift = _contiguous(gates, scale, shift)  # type: ignore[assignment]
        lists = list_kept(gates)
        dx = torch.empty_like(x)
        flat = _flat(x) and _flat(dx) and _flat(grad)
        shared = _geometry(kernel, stride, padding, dilation, flat) | {
            "FLAT": flat,
            "GRAD_ACROSS": _across(grad),
            "ACROSS": _across(x),
            "BLOCK_C": block_c,
            "BLOCK_R": min(block_c, 32),
        }

        dgates = gates.new_empty(tiles, *gates.shape)
        dscale, dshift = (None, None) if scale is None else gates.new_empty(2, tiles * batch, channels)
        _backward_input[(batch * tiles * ranges,)](
            grad,
            x,
            *lists,
            gates,
            scale,
            shift,
            _packed(weight, heads),
            dx,
            dgates,
            dscale,
            dshift,
            grad.stride(),
            x.stride(),
            dx.stride(),
            tuple(in_size),
            out_size,
            batch,
            heads,
            channels,
            filters // unit(filters),
            unit(filters),
            **shared,
            BLOCK_P=block_p,
            BLOCK_F=_block(filters, 16 if exact else 32),
            num_warps=_warps(block_c * block_p * 4),
        )

        programs = heads * triton.cdiv(filters, block_f) * ranges * taps
        share = triton.cdiv(max(batch, 1), min(max(batch, 1), triton.cdiv(PROGRAMS, programs)))
        parts = triton.cdiv(max(batch, 1), share)
        dweight = gates.new_empty(parts, weight.numel())
        _backward_weight[(parts * programs,)](
            grad,
            x,
            *lists,
            gates,
            scale,
            shift,
            dweight,
            grad.stride(),
            x.stride(),
            tuple(in_size),
            out_size,
            batch,
            share,
            heads,
            channels,
            filters // unit(filters),
            unit(filters),
            **shared,
            FILTERS_LAST=is_channels_last(weight),
            BLOCK_F=block_f,
            BLOCK_P=_block(out_size[0] * out_size[1], 32 if exact else 64),
            num_warps=_warps(block_c * block_f * 2),
        )
    return dx, dgates, dweight, dscale, dshift
