"""A network whose gates select by class, by image or not at all: its weights are set by hand."""

import torch
import torch.nn as nn

from dgc_fastai import DynamicGroupConv2d

CLASSES, CHANNELS = 4, 16


class Selecting(nn.Module):
    """Each class is told by four channels of its own, and each head keeps four of the sixteen.

    With `select`, they are those in which the image is strongest; otherwise always the first channel of each class.
    The score of a class is what its head finds in the channels of the class.
    """

    def __init__(self, select: bool):
        super().__init__()
        block = CHANNELS // CLASSES
        self.layer = DynamicGroupConv2d(CHANNELS, CLASSES, 1, heads=4, squeeze_rate=2, preact=False)
        self.layer.inactive_channels.fill_(CHANNELS - block)
        with torch.no_grad():
            identity = torch.eye(CHANNELS).expand(4, -1, -1)
            self.layer.gates.squeeze.copy_(identity)
            self.layer.gates.excite.copy_(identity * select)
            first = torch.arange(CHANNELS) % block == 0
            self.layer.gates.bias.copy_(1 + 1e-3 * torch.arange(CHANNELS) + (~torch.tensor(select)) * first)
            self.layer.weight.copy_(torch.eye(CLASSES).repeat_interleave(block, 1)[..., None, None])

    def forward(self, x):
        return self.layer(x).mean((2, 3))


def images_of_classes(count=200, own=True):
    """Images [count, 16, 3, 3] and their classes: strong in the channels of the class, or of another, random number."""
    generator = torch.Generator().manual_seed(0)
    labels, other = torch.randint(CLASSES, (2, count), generator=generator)
    strong = torch.eye(CLASSES).repeat_interleave(CHANNELS // CLASSES, 1)[labels if own else other]
    noise = 0.1 * torch.rand(count, CHANNELS, 3, 3, generator=generator)
    return strong[..., None, None] + noise, labels
