"""What `deploy` puts in the place of layers."""

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..ops import folded_norm
from ..ops.backends import cpu, per_sample
from ..ops.dense import group_conv2d, pack_groups, stem
from ..ops.layer import gated_layer, pack


class DeployedConv2d(nn.Module):
    """What `deploy` makes of a `DynamicGroupConv2d`: [B, C, H, W] -> [B, O, H', W'].

    Only the weight takes another type with `.to(dtype)`; what is small stays in float32, or float64.
    """

    scale: Optional[Tensor]
    shift: Optional[Tensor]
    bias: Optional[Tensor]

    PACKED = ("packed_weight", "winograd_weight", "packed_excite")
    SMALL = ("scale", "shift", "squeeze", "excite", "gate_bias", "bias")

    def __init__(self, layer: DynamicGroupConv2d):
        super().__init__()
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.rectify = False
        scale = shift = None
        if layer.preact:
            scale, shift = _folded(layer.norm, layer.weight.dtype)
        gates = layer.gates
        tensors = scale, shift, gates.squeeze, gates.excite, gates.bias, layer.bias
        small = cpu.sums_type(layer.weight.dtype)
        for name, tensor in zip(self.SMALL, tensors):
            self.register_buffer(name, None if tensor is None else tensor.detach().to(small).contiguous())
        self.register_buffer("weight", layer.weight.detach().contiguous())
        self.register_buffer("inactive_channels", layer.inactive_channels)
        for name in self.PACKED:
            self.register_buffer(name, self.weight.new_empty(0), persistent=False)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """With `residual`, the ReLU of its sum with the result."""
        if residual is not None and residual.shape != self._output_shape(x):
            return F.relu(gated_layer(x, *self._arguments) + residual)  # they are broadcast
        return gated_layer(x, *self._arguments, residual)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        return per_sample.output_shape(x.shape, self.weight.shape, self.stride, self.padding, self.dilation)

    def fold_norm(self, norm: nn.BatchNorm2d) -> None:
        """Take a batch norm that follows into the filters and the bias."""
        scale, shift = _folded(norm, self.weight.dtype)
        self.weight.mul_(scale.reshape(-1, 1, 1, 1))
        self.bias = shift.clone() if self.bias is None else self.bias * scale + shift

    def repack(self) -> None:
        """Make what the C++ kernel reads anew."""
        packed = pack(self.weight, self.squeeze, self.excite, self.stride, self.dilation)
        for name, tensor in zip(self.PACKED, packed):
            setattr(self, name, tensor)
        # Together, since to look up one buffer of a module takes as long as to convolve a few pixels.
        gating = self.squeeze, self.excite, self.gate_bias, self.inactive_channels
        geometry = self.stride, self.padding, self.dilation
        kept = self.weight.shape[1] - int(self.inactive_channels)
        self._arguments = self.scale, self.shift, *gating, self.weight, self.bias, self.rectify, *geometry, packed, kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        small = {name: getattr(self, name) for name in self.SMALL}
        super()._apply(fn, recurse)
        dtype = cpu.sums_type(self.weight.dtype)
        for name, before in small.items():
            if before is not None:
                setattr(self, name, before.to(self.weight.device, dtype))
        self.repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()

    def extra_repr(self) -> str:
        outputs, channels, *taps = self.weight.shape
        folded = ", bias=True" * (self.bias is not None) + ", relu=True" * self.rectify
        kernel = "x".join(map(str, taps))
        return (
            f"{channels}, {outputs}, kernel_size={kernel}, stride={self.stride[0]}, heads={len(self.squeeze)}{folded}"
        )


class DeployedGroupConv2d(nn.Module):
    """What `deploy` makes of a group convolution, such as the 3x3 ones of a DenseNet: by the C++ kernel, too."""

    bias: Optional[Tensor]

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.out_channels = conv.out_channels
        self.register_buffer("weight", conv.weight.detach().contiguous())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().contiguous())
        self.register_buffer("packed_weight", self.weight.new_empty(0), persistent=False)

    def forward(self, x: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """`out` [B, O, H', W'] is to be the result, if given."""
        return group_conv2d(x, *self._arguments, out)

    def repack(self) -> None:
        """Make what the C++ kernel reads anew."""
        self.packed_weight = pack_groups(self.weight, self.groups)
        geometry = self.stride, self.padding, self.dilation
        self._arguments = self.weight, self.bias, self.groups, *geometry, self.packed_weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()


class DeployedStem(DeployedGroupConv2d):
    """What `deploy` makes of a convolution of images, the ReLU and the max pooling after it."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)  # for where there is no C++ kernel

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, _, *rest = self._arguments
        return stem(x, weight, bias, *rest)


def _folded(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dtype = cpu.sums_type(dtype)
    return folded_norm.affine(norm, norm.running_mean.to(dtype), (norm.running_var.to(dtype) + norm.eps).rsqrt())


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether it does what one of these kinds does, and nothing besides."""
    return type(module) in kinds and not (module._forward_hooks or module._forward_pre_hooks)
