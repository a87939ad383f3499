"""The Dynamic Group Convolution layer.

Su, Fang et al., "Dynamic Group Convolution for Accelerating Convolutional Neural Networks", ECCV 2020.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from ..ops import folded_norm, fused_layer
from ..ops.gates import drop_smallest, head_gates, pool, spread_blocks
from ..ops.operator import gated_conv2d
from ..ops.reference import apply_norm
from ..ops.selection import fuses_norm

__all__ = ["DynamicGroupConv2d", "fitting_granularity", "squeezed_channels"]

# The distance of two neighboring gates that start at one: two units in the last place of float32. Equal gates would be
# dropped together, as ties are. These are dropped in the order of magnitude pruning until they are trained.
GATE_STEP = 2**-22


def squeezed_channels(channels: int, squeeze_rate: int) -> int:
    """Hidden units of each head's gates. Narrow layers squeeze half as much, as the authors' code does."""
    rate = squeeze_rate // 2 if channels < 80 else squeeze_rate
    return channels // rate if rate > 0 else 0


def fitting_granularity(channels: int, granularity: int) -> int:
    """The largest power of two that divides the channels and is at most `granularity`: what a network gives each of its
    layers.

    Raises:
        ValueError: granularity is no power of two.
    """
    if granularity < 1 or granularity & (granularity - 1):
        raise ValueError(f"granularity={granularity} is not a power of two")
    return min(granularity, channels & -channels)


class HeadGates(nn.Module):
    """The gates of all heads from the pooled features, one for each block of `granularity` neighboring channels; see
    `ops.gates.head_gates`."""

    def __init__(self, channels: int, heads: int, squeeze_rate: int, granularity: int = 1):
        super().__init__()
        squeezed = squeezed_channels(channels, squeeze_rate)
        if squeezed < 1:
            raise ValueError(f"squeeze_rate={squeeze_rate} leaves no hidden unit for {channels} input channels")
        blocks = channels // granularity
        self.squeeze = nn.Parameter(torch.empty(heads, squeezed, channels))
        self.excite = nn.Parameter(torch.empty(heads, blocks, squeezed))
        self.bias = nn.Parameter(torch.empty(heads, blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.squeeze, self.excite):  # Kaiming normal, each head a linear layer of its own
            nn.init.normal_(weight, std=(2 / weight.shape[-1]) ** 0.5)
        nn.init.ones_(self.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, C] -> [B, heads, C / granularity], in float32 whatever the input."""
        return head_gates(pooled, self.squeeze, self.excite, self.bias)


class RecomputeHooks:
    """Saved-tensor hooks that drop one tensor and recompute it in the backward pass.

    Args:
        tensor: the tensor to drop. It is recognized by its address and shape, since a reference would keep it alive.
        recompute: computes it again. The backward pass asks for it twice, for the convolution and for the ReLU before
            it; the result of the first call is kept for the second.
    """

    def __init__(self, tensor: Tensor, recompute: Callable[[], Tensor]):
        self.key, self.recompute = (tensor.data_ptr(), tensor.shape), recompute
        self.recomputed: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | None:
        return None if (tensor.data_ptr(), tensor.shape) == self.key else tensor

    def unpack(self, packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        if self.recomputed is None:
            self.recomputed = self.recompute()
            return self.recomputed
        recomputed, self.recomputed = self.recomputed, None
        return recomputed


class DynamicGroupConv2d(nn.Module):
    """Convolution whose heads each choose, per image, which input channels to look at (paper, section 3).

    Applies batch norm and ReLU, pools the result, lets every head compute a gate per channel and drop the
    channels with the smallest gates, and convolves what is left: [B, in_channels, H, W] ->
    [B, out_channels, H', W']. Output channel `o` is computed by head `o % heads`. Where a network has norms
    and activations of its own in their place, `preact=False` leaves the layer's out.

    How far training has come is held in the buffer `inactive_channels`, the number of channels that every
    head drops; `set_progress` moves it, the state dict carries it and evaluation uses it. A new layer drops
    nothing.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in `nn.Conv2d`.
        heads: number of heads H; divides out_channels.
        squeeze_rate: reduction in the gates' hidden layer; halved for fewer than 80 input channels.
        gate_factor: share of input channels each head keeps at the end of training, in (0, 1].
        granularity: how many neighboring input channels, a block, share one gate and are kept or dropped together;
            divides in_channels. 1 in the paper; 8, 16 or 32 fill vectors. Each head keeps at least one block.
        preact: apply batch norm and ReLU to the input first, as the paper does.
        zero_init_gates: start as the convolution that the layer replaces: the gates are one for every image, and the
            filters are drawn with the fan-out of the whole layer. Otherwise the gates start at random, as published.
        memory_efficient: compute norm and ReLU again in the backward pass of training instead of keeping what
            comes out of them; not under torch.compile, which decides that by itself.

    Raises:
        ValueError: heads does not divide out_channels, granularity does not divide in_channels, squeeze_rate leaves no
            hidden unit, or gate_factor is outside (0, 1].
    """

    penalty: Tensor | None
    inactive_channels: Tensor
    granularity: int = 1  # of layers that were pickled before there were blocks
    gate_observer: Any = None  # called with the kept gates [B, heads, C] of every forward pass

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        heads: int = 4,
        squeeze_rate: int = 16,
        gate_factor: float = 0.25,
        bias: bool = False,
        preact: bool = True,
        memory_efficient: bool = False,
        zero_init_gates: bool = False,
        granularity: int = 1,
    ):
        super().__init__()
        if heads < 1 or out_channels % heads:
            raise ValueError(f"heads={heads} does not divide the {out_channels} output channels of a DGC layer")
        if granularity < 1 or in_channels % granularity:
            raise ValueError(
                f"granularity={granularity} does not divide the {in_channels} input channels of a DGC layer"
            )
        if not 0 < gate_factor <= 1:
            raise ValueError(f"gate_factor={gate_factor} is not in (0, 1]")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, int] = _pair(kernel_size)
        self.stride: tuple[int, int] = _pair(stride)
        self.padding: tuple[int, int] = _pair(padding)
        self.dilation: tuple[int, int] = _pair(dilation)
        self.heads = heads
        self.squeeze_rate = squeeze_rate
        self.gate_factor = gate_factor
        self.granularity = granularity
        self.preact = preact
        self.memory_efficient = memory_efficient
        self.zero_init_gates = zero_init_gates

        self.norm = nn.BatchNorm2d(in_channels) if preact else nn.Identity()
        self.gates = HeadGates(in_channels, heads, squeeze_rate, granularity)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        # An integer, so that `.half()` cannot round it.
        self.register_buffer("inactive_channels", torch.tensor(0))
        self.penalty = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published, each head's filters are initialized as a separate convolution, with the fan-out of one head."""
        kh, kw = self.kernel_size
        fan_out = self.out_channels if self.zero_init_gates else self.out_channels // self.heads
        nn.init.normal_(self.weight, std=(2 / (kh * kw * fan_out)) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm.reset_parameters()
        self.gates.reset_parameters()
        if self.zero_init_gates and not self.weight.is_meta:
            self.open_gates()

    @torch.no_grad()
    def open_gates(self) -> None:
        """Set all gates to one for every image, and keep what the layer then computes: a convolution with its filters.

        The second weights of the gates become zero, so the gates do not depend on the image until they have learned to.
        """
        self.gates.excite.zero_()
        filters = self.weight.float().unflatten(0, (-1, self.heads)).flatten(3)  # [O / heads, heads, C, kh * kw]
        sizes = filters.square().sum((0, 3)).unflatten(1, (-1, self.granularity)).sum(2)
        order = sizes.argsort(-1).argsort(-1)  # [heads, blocks], 0 for the smallest
        gates = 1 + GATE_STEP * (order - (order.shape[1] - 1) / 2)
        self.gates.bias.copy_(gates)
        gates = spread_blocks(gates, self.in_channels)
        self.weight.copy_((filters / gates.unsqueeze(-1)).reshape_as(self.weight))  # gate x filter is what it was

    @classmethod
    def like(cls, conv: nn.Conv2d, **keywords: Any) -> "DynamicGroupConv2d":
        """A new layer with the geometry, device and type of a convolution; `keywords` as in the constructor."""
        geometry: tuple[Any, Any, Any, Any] = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        layer = cls(conv.in_channels, conv.out_channels, *geometry, bias=conv.bias is not None, **keywords)
        return layer.to(device=conv.weight.device, dtype=conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self._fuses_norm(x):
                return self._add_bias(self._fused(x, self.norm))
            if self._recomputes():
                return self._add_bias(self._recomputing(x))
        if self.preact:
            x = F.relu(self.norm(x), inplace=True)
        return self._add_bias(self._convolve(x))

    def _convolve(self, x: Tensor) -> Tensor:
        """Gates, selection and convolution of normalized x."""
        if not torch.jit.is_scripting():
            if self._is_fused(x):
                return self._fused(x, None)
        gates = self.gates(pool(x))
        if self.training:
            self.penalty = gates.mean((0, 2)).sum()
        gates = drop_smallest(gates, self.inactive_channels, self.granularity)
        if not torch.jit.is_scripting():
            if self.gate_observer is not None:
                self.gate_observer(spread_blocks(gates, self.in_channels))
        return gated_conv2d(x, gates, self.weight, None, None, self.stride, self.padding, self.dilation)

    def _add_bias(self, y: Tensor) -> Tensor:
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).reshape(1, -1, 1, 1)
        return y

    @torch.jit.unused
    def _fused(self, x: Tensor, norm: Any) -> Tensor:
        """All of the layer by the kernels of a GPU; without a norm, x is normalized."""
        gates, geometry = self.gates, fused_layer.Geometry(self.stride, self.padding, self.dilation)
        # The kernels compute a gate for each channel; those of a block are equal to the last bit, so that they are kept
        # or dropped together.
        excite, bias = (spread_blocks(part, self.in_channels, 1) for part in (gates.excite, gates.bias))
        weights = self.weight, gates.squeeze, excite, bias
        y, penalty, kept = fused_layer.fused_layer(x, *weights, self.inactive_channels, norm, geometry)
        if self.training:
            self.penalty = penalty
        if self.gate_observer is not None:
            self.gate_observer(kept)
        return y

    @torch.jit.unused
    def _is_fused(self, x: Tensor) -> bool:
        """Whether `_fused` computes the layer. It calls no hooks of the gates, which may replace them."""
        return fused_layer.is_supported(x, self.gates.squeeze) and not self.gates._forward_hooks

    @torch.jit.unused
    def _recomputes(self) -> bool:
        """Whether to, and whether the norm is one of the kind that `_recomputing` stands in for."""
        norm = self.norm
        return (
            self.memory_efficient
            and type(norm) is nn.BatchNorm2d
            and norm.training
            and norm.momentum is not None
            and norm.affine
            and norm.track_running_stats
            and not (norm._forward_hooks or norm._forward_pre_hooks)
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    @torch.jit.unused
    def _recomputing(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        norm.num_batches_tracked.add_(1)
        y, mean, inverse = torch.native_batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        with torch.no_grad():
            scale, shift = folded_norm.affine(norm, mean, inverse)
        source = x.detach()
        hooks = RecomputeHooks(y, lambda: apply_norm(source, scale, shift))
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            y = F.relu(y, inplace=True)
            return self._convolve(y)

    @torch.jit.unused
    def _fuses_norm(self, x: Tensor) -> bool:
        """Whether norm and ReLU are left to what computes the rest of the layer."""
        return (
            self.preact
            and self._is_fused(x)
            and fused_layer.folds_norm(self.norm, x)
            and fuses_norm(x, self.weight, self.heads, self.stride, self.padding, self.dilation)
        )

    def __getstate__(self) -> dict:
        # `penalty` hangs on the last forward's graph, which can be neither copied nor pickled; an observer watches this
        # layer only.
        state = {**self.__dict__, "penalty": None}
        state.pop("gate_observer", None)
        return state

    def extra_repr(self) -> str:
        kernel, stride = "x".join(map(str, self.kernel_size)), self.stride[0]
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={kernel}, stride={stride}, "
            f"heads={self.heads}, squeeze_rate={self.squeeze_rate}, gate_factor={self.gate_factor}"
            + (f", granularity={self.granularity}" if self.granularity > 1 else "")
            + (", bias=True" if self.bias is not None else "")
            + ("" if self.preact else ", preact=False")
        )
