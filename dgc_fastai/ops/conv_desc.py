"""The geometry of a convolution."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from . import structures

__all__ = ["ConvDesc", "Pair", "conv_desc"]

Pair = tuple[int, int]  # vertical, horizontal


@dataclass(frozen=True, eq=False)
class ConvDesc:
    """The geometry of a convolution [B, C, H, W] -> [B, O, H', W']; see `conv_desc`."""

    batch: int
    heads: int
    """Of a DGC layer, or groups of an ordinary convolution."""
    channels: int
    """Input channels that one head can read."""
    filters: int
    """Output channels of one head."""
    grouped: bool
    """Whether heads read channels of their own, and their outputs lie side by side. Otherwise all read the same ones,
    and their outputs are interleaved."""
    in_size: Pair
    out_size: Pair
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @functools.cached_property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads * self.filters, *self.out_size

    @functools.cached_property
    def is_pointwise(self) -> bool:
        """Whether the convolution is a matrix product: 1x1 filters and no padding."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    @functools.cached_property
    def struct(self) -> structures.ConvDesc:
        """The same for the C++ kernel."""
        axes = zip(self.in_size, self.out_size, self.kernel_size, self.stride, self.padding, self.dilation)
        y, x = (structures.Axis(*axis) for axis in axes)
        return structures.ConvDesc(self.batch, self.heads, self.channels, self.filters, self.grouped, y, x)


def conv_desc(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    heads: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    grouped: bool = False,
) -> ConvDesc:
    """The geometry of a convolution, from a cache if its sizes are numbers rather than symbols.

    Args:
        x_shape: [B, C, H, W].
        weight_shape: [O, C, kh, kw], with C / heads instead of C if `grouped`.

    Raises:
        ValueError: the numbers of channels do not agree, or heads does not divide O.
    """
    try:
        return _cached_desc(x_shape, weight_shape, heads, stride, padding, dilation, grouped)
    except TypeError:  # what the dispatcher passes can be a list, which cannot be hashed, nor can a symbolic size
        geometry = tuple(stride), tuple(padding), tuple(dilation)
    if all(type(size) is int for size in (*x_shape, *weight_shape)):
        return _cached_desc(x_shape, weight_shape, heads, *geometry, grouped)
    return _desc(x_shape, weight_shape, heads, *geometry, grouped)


def _desc(x_shape, weight_shape, heads, stride, padding, dilation, grouped) -> ConvDesc:
    outputs, channels, *kernel_size = weight_shape
    if x_shape[1] != (heads * channels if grouped else channels):
        raise ValueError(f"{x_shape[1]} input channels, but filters {list(weight_shape)} and {heads} heads")
    if outputs % heads:
        raise ValueError(f"{heads} heads do not divide {outputs} output channels")
    out_size = tuple(
        (size + 2 * pad - dilate * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, dilate in zip(x_shape[2:], kernel_size, stride, padding, dilation)
    )
    return ConvDesc(
        batch=x_shape[0],
        heads=heads,
        channels=channels,
        filters=outputs // heads,
        grouped=grouped,
        in_size=tuple(x_shape[2:]),
        out_size=out_size,
        kernel_size=tuple(kernel_size),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


_cached_desc = functools.lru_cache(4096)(_desc)
