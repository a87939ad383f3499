"""Chains of concatenations that are written into one tensor: x1 = cat([x, y0]), x2 = cat([x1, y1]), ...

As separate tensors their sizes add up to the square of the length of the chain.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .modules import DeployedGroupConv2d

__all__ = ["Concatenation", "append", "append_result", "start"]


class Concatenation:
    """The current value of a chain: the first channels of a tensor that has room for all of them.

    Without such a tensor, where autograd or a compiler follows what happens, it is concatenated as in the network.
    """

    def __init__(self, x: Tensor, added: int):
        self.value = x
        self.room: Tensor | None = None
        followed = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not followed and not (torch.is_grad_enabled() and x.requires_grad):
            channels = x.shape[1]
            self.room = x.new_empty(len(x), channels + added, *x.shape[2:])
            self.room.narrow(1, 0, channels).copy_(x)

    def place(self, channels: int) -> Tensor | None:
        """Where the next channels belong, [B, channels, H, W], if there is room for them."""
        return None if self.room is None else self.room.narrow(1, self.value.shape[1], channels)

    def extend(self, y: Tensor, place: Tensor | None) -> Tensor:
        """The value with y appended, which is at its place already if it is `place`."""
        if place is None or y.dtype != place.dtype:  # autocast: concatenation promotes types
            self.room, self.value = None, torch.cat([self.value, y], 1)
            return self.value
        assert self.room is not None
        if y is not place:
            place.copy_(y)
        self.value = self.room.narrow(1, 0, self.value.shape[1] + y.shape[1])
        return self.value


def start(x: Tensor, added: int) -> Concatenation:
    """A chain that begins with x [B, C, H, W] and grows by `added` channels in all."""
    return Concatenation(x, added)


def append(chain: Concatenation, y: Tensor) -> Tensor:
    """The chain's next value, [B, C + channels of y, H, W]."""
    return chain.extend(y, chain.place(y.shape[1]))


def append_result(chain: Concatenation, conv: "DeployedGroupConv2d", x: Tensor) -> Tensor:
    """As `append(chain, conv(x))`, for a convolution that writes its result to where it is told."""
    place = chain.place(conv.out_channels)
    return chain.extend(conv(x, place), place)
