"""Augmentation by name: of batches on the device, and of single images read from files."""

import math

import torch
import torch.nn.functional as F
from fastai.torch_basics import TensorImage, Transform
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from ..recipe.schema import Data

__all__ = [
    "RandomCropFlip",
    "RandomErasing",
    "batch_augmentation",
    "evaluation_transform",
    "training_transform",
]

AUTOMATIC = {"rand_augment": v2.RandAugment, "trivial_augment": v2.TrivialAugmentWide}


def batch_augmentation(data: Data) -> list[Transform]:
    """fastai transforms for training batches [B, C, H, W] of a small set, by the names in `data.augment`."""
    transforms: list[Transform] = []
    if "crop_flip" in data.augment:
        # A mirrored digit is a different symbol.
        transforms.append(RandomCropFlip(padding=data.image_size // 8, flip=data.name != "digits"))
    transforms += [Automatic(AUTOMATIC[name]()) for name in data.augment if name in AUTOMATIC]
    return transforms + ([RandomErasing()] if "random_erasing" in data.augment else [])


def training_transform(data: Data, may_leave_large: bool = False) -> v2.Transform:
    """The torchvision transform of a training image, PIL to uint8 [3, H, W], by the names in `data.augment`.

    Args:
        may_leave_large: crops of up to twice the size need not be resized, because the device will do it.
    """
    automatic = [AUTOMATIC[name]() for name in data.augment if name in AUTOMATIC]
    if automatic:  # on PIL images these take half the time
        automatic = [v2.ToPILImage(), *automatic, v2.PILToTensor()]
    if "crop_flip" not in data.augment:
        return v2.Compose([evaluation_transform(data), *automatic])
    max_side = 2 * data.image_size if may_leave_large and not automatic else 0
    return v2.Compose([FileCropFlip(data.image_size, max_side), *automatic])


def evaluation_transform(data: Data) -> v2.Transform:
    """Resize the shorter side to 256 / 224 of the size, then crop the center; PIL to uint8 [3, size, size]."""
    size = data.image_size
    # PyTorch resizes channels-last bytes, as here, about three times as fast as Pillow.
    return v2.Compose([v2.PILToTensor(), v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])


class FileCropFlip(v2.Transform):
    """RandomResizedCrop and RandomHorizontalFlip of a PIL image, with torchvision's distributions; uint8 [3, H, W].

    Args:
        size: side that crops are resized to.
        max_side: crops whose sides are at most this are not resized.
    """

    def __init__(self, size: int, max_side: int = 0):
        super().__init__()
        self.size, self.max_side = size, max_side
        self.crop, self.flip = v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()

    def forward(self, image: Image.Image) -> Tensor:
        crop = self.flip(TF.pil_to_tensor(TF.crop(image, **self.crop.make_params([image]))))
        return crop if max(crop.shape[1:]) <= self.max_side else TF.resize(crop, [self.size] * 2, antialias=True)


class RandomCropFlip(Transform):
    """Pads with black, crops back at a random place, and mirrors half of the images; drawn for each image."""

    order, split_idx = 5, 0  # on uint8, so before IntToFloatTensor (10); training only

    def __init__(self, padding: int, flip: bool):
        super().__init__()
        self.padding, self.flip = padding, flip

    def encodes(self, x: TensorImage):
        batch, channels, height, width = x.shape
        on = dict(device=x.device)
        rows = torch.randint(2 * self.padding + 1, (batch, 1), **on) + torch.arange(height, **on)
        columns = torch.randint(2 * self.padding + 1, (batch, 1), **on) + torch.arange(width, **on)
        if self.flip:
            columns = torch.where(torch.rand(batch, 1, **on) < 0.5, columns.flip(1), columns)
        sample = torch.arange(batch, **on).view(-1, 1, 1, 1)
        channel = torch.arange(channels, **on).view(1, -1, 1, 1)
        padded = F.pad(x, [self.padding] * 4)
        return padded[sample, channel, rows.view(batch, 1, -1, 1), columns.view(batch, 1, 1, -1)]


class Automatic(Transform):
    """RandAugment or TrivialAugment of a batch in `GROUPS` parts; the images of a part get the same operations."""

    order, split_idx = 6, 0
    GROUPS = 16  # torchvision draws once per call, and a call per image would take longer than the training step

    def __init__(self, function: v2.Transform):
        super().__init__()
        self.function = function

    def encodes(self, x: TensorImage):
        return torch.cat([self.function(part) for part in x.chunk(self.GROUPS)])


class RandomErasing(Transform):
    """Sets a random rectangle to the data's mean in a quarter of the images; drawn for each (Zhong et al., 2020).

    Its area is 2 to 33 % of the image and its aspect ratio 0.3 to 3.3, as in the paper and in timm.
    """

    order, split_idx = 100, 0  # after Normalize (99), where the mean is 0

    def __init__(self, share: float = 0.25):
        super().__init__()
        self.share = share

    def encodes(self, x: TensorImage):
        batch, _, height, width = x.shape

        def uniform(low: float, high: float):
            return torch.empty(batch, 1, 1, device=x.device).uniform_(low, high)

        area, sides = uniform(0.02, 1 / 3) * height * width, uniform(math.log(0.3), math.log(3.3)).exp()
        inside = uniform(0, 1) < self.share
        for length, side, axis in ((height, sides, 1), (width, 1 / sides, 2)):
            extent = (area * side).sqrt().round().clamp(1, length)
            start = (uniform(0, 1) * (length - extent + 1)).floor()
            place = torch.arange(length, device=x.device).view([-1 if n == axis else 1 for n in range(3)])
            inside = inside & (place >= start) & (place < start + extent)
        return x.masked_fill(inside.unsqueeze(1), 0)
