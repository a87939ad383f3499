"""What `deploy` puts in the place of layers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..ops import folded_norm
from ..ops.dense import group_conv2d, stem
from ..ops.kernel import acc_dtype
from ..ops.layer import gated_layer
from ..ops.packed_layer import GateWeights, PackedLayer


class _Deployed(nn.Module):
    """A module whose parameters are packed for the C++ kernel; call `repack` after a change to any of them."""

    packed: PackedLayer

    def repack(self) -> None:
        """Pack the parameters as they are now."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()


class DeployedConv2d(_Deployed):
    """What `deploy` makes of a `DynamicGroupConv2d`: [B, C, H, W] -> [B, O, H', W'].

    `.to(dtype)` converts the weight only; all that is small stays in float32, or float64.
    """

    weight: Tensor
    squeeze: Tensor
    excite: Tensor
    gate_bias: Tensor
    inactive_channels: Tensor
    scale: Tensor | None
    shift: Tensor | None
    bias: Tensor | None

    SMALL = ("scale", "shift", "squeeze", "excite", "gate_bias", "bias")

    def __init__(self, layer: DynamicGroupConv2d):
        super().__init__()
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self._relu = False
        scale = shift = None
        if layer.preact:
            scale, shift = _folded(layer.norm, layer.weight.dtype)
        gates = layer.gates
        tensors = scale, shift, gates.squeeze, gates.excite, gates.bias, layer.bias
        small = acc_dtype(layer.weight.dtype)
        for name, tensor in zip(self.SMALL, tensors):
            self.register_buffer(name, None if tensor is None else tensor.detach().to(small).contiguous())
        self.register_buffer("weight", layer.weight.detach().contiguous())
        self.register_buffer("inactive_channels", layer.inactive_channels)
        self.repack()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """With `residual`, which can be broadcast to [B, O, H', W'], the ReLU of its sum with the result."""
        return gated_layer(x, self.packed, residual)

    @property
    def relu(self) -> bool:
        """Whether a ReLU follows."""
        return self._relu

    @relu.setter
    def relu(self, relu: bool) -> None:
        self._relu = relu
        self.repack()

    def fold_norm(self, norm: nn.BatchNorm2d) -> None:
        """Fold a batch norm that follows into the filters and the bias."""
        scale, shift = _folded(norm, self.weight.dtype)
        self.weight.mul_(scale.reshape(-1, 1, 1, 1))
        self.bias = shift.clone() if self.bias is None else self.bias * scale + shift
        self.repack()

    def repack(self) -> None:
        self.packed = PackedLayer(
            self.weight,
            self.bias,
            len(self.squeeze),
            self.stride,
            self.padding,
            self.dilation,
            self.relu,
            self.scale,
            self.shift,
            GateWeights(self.squeeze, self.excite, self.gate_bias, self.inactive_channels),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        small = {name: getattr(self, name) for name in self.SMALL}
        nn.Module._apply(self, fn, recurse)
        dtype = acc_dtype(self.weight.dtype)
        for name, before in small.items():
            if before is not None:
                setattr(self, name, before.to(self.weight.device, dtype))
        self.repack()
        return self

    def extra_repr(self) -> str:
        outputs, channels, *taps = self.weight.shape
        size = self.packed.granularity
        folded = f", granularity={size}" * (size > 1) + ", bias=True" * (self.bias is not None)
        folded += ", relu=True" * self.relu
        kernel = "x".join(map(str, taps))
        return (
            f"{channels}, {outputs}, kernel_size={kernel}, stride={self.stride[0]}, heads={len(self.squeeze)}{folded}"
        )


class DeployedGroupConv2d(_Deployed):
    """What `deploy` makes of a group convolution, such as the 3x3 ones of a DenseNet."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.out_channels = conv.out_channels
        self.register_buffer("weight", conv.weight.detach().contiguous())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().contiguous())
        self.repack()

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`out` [B, O, H', W'] is the tensor to write into, if given."""
        return group_conv2d(x, self.packed, out)

    def repack(self) -> None:
        geometry: Any = self.stride, self.padding, self.dilation
        self.packed = PackedLayer(self.weight, self.bias, self.groups, *geometry)


class DeployedStem(DeployedGroupConv2d):
    """What `deploy` makes of a convolution of images, the ReLU and the max pooling after it."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)  # for the case without the kernel
        self.repack()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return stem(x, self.packed)


def _folded(norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(dtype)
    return folded_norm.affine(norm, norm.running_mean.to(dtype), (norm.running_var.to(dtype) + norm.eps).rsqrt())


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether it does what one of these kinds does, and nothing besides."""
    return type(module) in kinds and not (module._forward_hooks or module._forward_pre_hooks)
