"""Group convolutions."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..ops.dense import TrainedGroupConv, trains_group_conv


class GroupConv2d(nn.Conv2d):
    """As `nn.Conv2d`; groups of a few channels are trained by the C++ kernel on a CPU, several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self.bias is None and trains_group_conv(x, self.weight, self.groups):
                return TrainedGroupConv.apply(x, self.weight, self.groups, self.stride, self.padding, self.dilation)
        return self._conv_forward(x, self.weight, self.bias)


class StaticGroupConv2d(nn.Sequential):
    """An ordinary group convolution whose groups are interleaved as the heads of a DGC layer are (ShuffleNet's
    channel shuffle), so that the next one's groups see something of each.

    Raises:
        ValueError: heads does not divide the channels.
    """

    def __init__(self, conv: nn.Conv2d, heads: int):
        for side, channels in (("input", conv.in_channels), ("output", conv.out_channels)):
            if heads < 1 or channels % heads:
                raise ValueError(f"heads={heads} does not divide the {channels} {side} channels of a group convolution")
        geometry: tuple[Any, Any, Any, Any] = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        sizes = conv.in_channels, conv.out_channels
        grouped = nn.Conv2d(*sizes, *geometry, groups=heads, bias=conv.bias is not None)
        super().__init__(grouped.to(device=conv.weight.device, dtype=conv.weight.dtype), nn.ChannelShuffle(heads))
