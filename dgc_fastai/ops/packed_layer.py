"""The parameters of one layer for inference, as they are and as the C++ kernel reads them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernel, structures
from .conv_desc import ConvDesc, Pair, conv_desc

__all__ = ["GateWeights", "Packed", "PackedLayer", "pack_weight", "pack_winograd_weight", "winograd_pays"]

MAX_WINOGRAD_WEIGHT = 2**18  # values


class GateWeights(NamedTuple):
    """The gates of a layer; see `gates.head_gates` and `gates.drop_smallest`."""

    squeeze: Tensor
    """[heads, hidden, C]"""
    excite: Tensor
    """[heads, G, hidden]; G = C, or fewer where blocks of C / G neighboring channels share a gate."""
    bias: Tensor
    """[heads, G]"""
    inactive: Tensor
    """How many channels each head drops: an integer tensor of no dimensions."""


class Packed(NamedTuple):
    """What the C++ kernel reads instead; empty where it is not to be used."""

    weight: Tensor
    winograd_weight: Tensor
    excite: Tensor


class PackedLayer:
    """The parameters of a DGC layer, or without `gates` of an ordinary group convolution.

    Its tensors are those that were given, not copies, and are read at each call; but what is packed is that of the time
    when the layer was made. Copies and pickles pack anew.

    Args:
        weight: [O, C, kh, kw], with C / heads instead of C if there are no gates.
        bias: [O].
        heads: of a DGC layer, or groups; divides O.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.
        relu: whether a ReLU follows.
        scale, shift: [C] each, a folded batch norm: the convolution reads `relu(x * scale + shift)`.
        packed: of another layer; otherwise the weight is packed here, if it is on a CPU and the kernel is available.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        heads: int,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        relu: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        gates: GateWeights | None = None,
        packed: Packed | None = None,
    ):
        self.weight, self.bias, self.heads, self.relu = weight, bias, heads, relu
        self.stride: Pair = (stride[0], stride[1])  # the dispatcher passes lists
        self.padding: Pair = (padding[0], padding[1])
        self.dilation: Pair = (dilation[0], dilation[1])
        self.scale, self.shift, self.gates = scale, shift, gates
        self.weight_shape, self.grouped = weight.shape, gates is None
        self.granularity = 1 if gates is None else weight.shape[1] // gates.bias.shape[1]
        """How many neighboring channels share a gate."""
        self.kept: int | None = None
        """How many gates a head keeps, for exports, which cannot read a tensor. Not known if made `from_flat`."""
        if packed is None:
            packed = self._pack()
            if gates is not None:
                self.kept = gates.bias.shape[1] - int(gates.inactive) // self.granularity
        self.packed = packed
        self.is_packed = packed.weight.numel() > 0
        self._struct: tuple[structures.PackedLayer, list[Tensor]] | None = None
        """The layer as the C++ kernel reads it, and the tensors that its addresses are of."""
        # Not a property: torch.compile reads it at each call.
        self.flat = (
            weight,
            bias,
            heads,
            self.stride,
            self.padding,
            self.dilation,
            relu,
            scale,
            shift,
            *(gates or (None,) * 4),
            *packed,
        )
        """All of it as the arguments of an operator, whose schema is `SCHEMA`."""

    SCHEMA = (
        "Tensor weight, Tensor? bias, int heads, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool relu, "
        "Tensor? scale, Tensor? shift, Tensor? squeeze, Tensor? excite, Tensor? gate_bias, Tensor? inactive, "
        "Tensor packed_weight, Tensor packed_winograd_weight, Tensor packed_excite"
    )

    @classmethod
    def from_flat(cls, *flat: Any) -> "PackedLayer":
        """The inverse of `flat`."""
        *arguments, squeeze, excite, gate_bias, inactive, weight, winograd_weight, packed_excite = flat
        gates = None if squeeze is None else GateWeights(squeeze, excite, gate_bias, inactive)
        packed = Packed(weight, winograd_weight, packed_excite)
        return cls(*arguments, gates=gates, packed=packed)  # type: ignore[misc]

    def __reduce__(self) -> tuple:
        arguments = self.weight, self.bias, self.heads, self.stride, self.padding, self.dilation, self.relu
        return PackedLayer, (*arguments, self.scale, self.shift, self.gates)

    def desc(self, x_shape: Sequence[int]) -> ConvDesc:
        """The geometry of the layer for an input of this shape."""
        geometry = self.stride, self.padding, self.dilation
        return conv_desc(x_shape, self.weight_shape, self.heads, *geometry, self.grouped)

    def is_supported(self, x: Tensor) -> bool:
        """Whether `run` can be called for such an input, the samples of which may lie apart from one another."""
        if not (self.is_packed and x.device.type == "cpu" and x.dtype in kernel.TYPES):
            return False
        height, width = x.shape[2:]
        return (
            self.packed.weight.dtype == kernel.acc_dtype(x.dtype)
            and (x.is_contiguous() or x.stride()[1:] == (height * width, width, 1))
            and kernel.library() is not None
        )

    def run(self, name: str, desc: ConvDesc, x: Tensor, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """Fill y, the samples of which may lie apart from one another, by a forward function of the C++ kernel.

        Args:
            name: of the function.
            residual: as y, contiguous.

        Returns:
            y.
        """
        made = self._struct  # held until the kernel returns, whatever other threads make meanwhile
        if made is None:
            made = self._struct = self._make_struct()
        args = structures.ForwardArgs(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            residual=None if residual is None else residual.data_ptr(),
            y=y.data_ptr(),
            y_stride=y.stride(0),
        )
        kernel.function(name, x.dtype)(desc.struct, made[0], args)
        return y

    def _pack(self) -> "Packed":
        weight, none = self.weight, self.weight.new_empty(0)
        if weight.device.type != "cpu" or weight.dtype not in kernel.TYPES or kernel.library() is None:
            return Packed(none, none, none)
        packed = pack_weight(weight, self.heads, self.grouped)
        if self.gates is None:
            return Packed(packed, none, none)
        winograd = (
            pack_winograd_weight(weight, self.heads)
            if winograd_pays(weight.shape, self.stride, self.dilation)
            else none
        )
        return Packed(packed, winograd, self.gates.excite.transpose(1, 2).contiguous())

    def _make_struct(self) -> tuple[structures.PackedLayer, list[Tensor]]:
        dtype = self.packed.weight.dtype
        alive: list[Tensor] = []

        def address(tensor: Tensor | None) -> int | None:
            if tensor is None or tensor.numel() == 0:
                return None
            alive.append(tensor.to(dtype).contiguous())
            return alive[-1].data_ptr()

        struct = structures.PackedLayer(
            weight=address(self.packed.weight),
            winograd_weight=address(self.packed.winograd_weight),
            bias=address(self.bias),
            scale=address(self.scale),
            shift=address(self.shift),
            relu=self.relu,
        )
        if self.gates is not None:
            struct.squeeze, struct.hidden = address(self.gates.squeeze), self.gates.squeeze.shape[1]
            struct.excite, struct.gate_bias = address(self.packed.excite), address(self.gates.bias)
            struct.inactive, struct.granularity = self.gates.inactive.data_ptr(), self.granularity
        return struct, alive


def pack_weight(weight: Tensor, heads: int, grouped: bool = False) -> Tensor:
    """Filters [O, C, kh, kw] in the order in which the C++ kernel reads them; see csrc/pack_weight.h.

    Returns:
        A tensor of as many values, in `kernel.acc_dtype` of their type.
    """
    return _pack(weight, heads, grouped, "pack_weight", weight.shape)


def pack_winograd_weight(weight: Tensor, heads: int) -> Tensor:
    """As `pack_weight`, of filters [O, C, 3, kw], transformed to the six points of csrc/winograd.h."""
    outputs, channels, _, width = weight.shape
    return _pack(weight, heads, False, "pack_winograd_weight", (6, outputs, channels, width))


def winograd_pays(weight_shape: Sequence[int], stride: Pair, dilation: Pair) -> bool:
    """Whether Winograd's algorithm is the faster one for filters [O, C, kh, kw].

    It halves the multiplications, but reads twice as many weights: where these do not fit into the cache, they come
    from memory for each sample again, which takes longer than to multiply.
    """
    outputs, channels, height, width = weight_shape
    small = outputs * channels * width <= MAX_WINOGRAD_WEIGHT
    return height == 3 and tuple(stride) == (1, 1) and dilation[0] == 1 and small


def _pack(weight: Tensor, heads: int, grouped: bool, name: str, shape: Sequence[int]) -> Tensor:
    weight = weight.contiguous()
    packed = torch.empty(shape, dtype=kernel.acc_dtype(weight.dtype))
    channels = heads * weight.shape[1] if grouped else weight.shape[1]
    desc = conv_desc((1, channels, *weight.shape[2:]), weight.shape, heads, (1, 1), (0, 0), (1, 1), grouped)
    args = structures.PackArgs(weight=weight.data_ptr(), packed=packed.data_ptr())
    kernel.function(name, weight.dtype)(desc.struct, args)
    return packed
