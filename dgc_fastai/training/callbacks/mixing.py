"""MixUp and CutMix as fastai's, with the same random numbers, but without waiting for a GPU; and both together."""

import torch
from fastai.callback.mixup import CutMix, MixHandler, MixUp
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. The copy to a GPU is from pinned memory: any other one waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DeviceMixUp(MixUp):
    """fastai's MixUp."""

    name = "mix_up"

    def before_batch(self):
        images, device = self.x, self.x.device
        share = self.distrib.sample((len(images),)).squeeze()
        self.lam = send(torch.maximum(share, 1 - share), device)
        others = send(torch.randperm(len(images)), device)
        self.yb1 = (self.y[others],)
        self.learn.xb = (torch.lerp(images[others], images, self.lam.view(-1, 1, 1, 1)),)


class DeviceCutMix(CutMix):
    """fastai's CutMix, whose place is computed on the CPU, where it is drawn."""

    name = "cut_mix"

    def before_batch(self):
        images, device = self.x, self.x.device
        *_, height, width = images.shape
        share = self.distrib.sample((1,))
        others = send(torch.randperm(len(images)), device)
        side = torch.sqrt(1.0 - share)
        columns, rows = (_extent(length, side) for length in (width, height))
        self.yb1 = (self.y[others],)
        images[..., rows, columns] = images[others][..., rows, columns]
        area = torch.tensor((columns.stop - columns.start) * (rows.stop - rows.start))
        self.lam = torch.full((1,), float(1 - area / (width * height)), device=device)


def _extent(length: int, side: Tensor) -> slice:
    """A random place, along an axis, of a rectangle with a side of this share."""
    half = int(torch.round(length * side)) // 2
    center = int(torch.randint(0, length, (1,)))
    return slice(max(center - half, 0), min(center + half, length))


class MixUpOrCutMix(MixHandler):
    """MixUp or CutMix, chosen for each batch with equal probability.

    Args:
        mixup, cutmix: alpha of each one's beta distribution.
    """

    def __init__(self, mixup: float, cutmix: float):
        super().__init__()
        self.choices = DeviceMixUp(mixup), DeviceCutMix(cutmix)

    def before_batch(self):
        choice = self.choices[int(torch.rand(()) < 0.5)]
        choice.learn, choice.stack_y = self.learn, self.stack_y
        choice.before_batch()
        self.lam, self.yb1 = choice.lam, choice.yb1
