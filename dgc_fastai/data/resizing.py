"""Resizing the crops of a batch on the device, by a number of kernels that does not depend on the batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from fastai.torch_basics import ItemTransform, TensorImage
from torch import Tensor

__all__ = ["Crops", "ResizeCrops", "flatten_crops", "resize_crops"]

ALIGNMENT = 16  # sizes are rounded up to a multiple of this, as matrix units need


class Crops(NamedTuple):
    """The uint8 crops of a batch as one flat tensor: each tensor costs a worker a file descriptor, and a transfer."""

    bytes: Tensor
    """The crops one after the other, each [H, W, 3], then `width` pixels of padding."""
    places: Tensor
    """Offset, height and width of each crop, [B, 3]."""
    height: int
    """At least that of the highest crop."""
    width: int
    """At least that of the widest crop."""


def flatten_crops(crops: Sequence[Tensor]) -> Crops:
    """Collate uint8 crops [3, H, W] of different sizes."""
    images = [crop.as_subclass(Tensor).permute(1, 2, 0) for crop in crops]  # their order in memory
    sizes = torch.tensor([image.shape[:2] for image in images])
    lengths = 3 * sizes.prod(1)
    height, width = (-(-int(longest) // ALIGNMENT) * ALIGNMENT for longest in sizes.amax(0))
    padding = images[0].new_zeros(3 * width)
    flat = torch.cat([*(image.reshape(-1) for image in images), padding])
    return Crops(flat, torch.column_stack([lengths.cumsum(0) - lengths, sizes]), height, width)


def resize_crops(crops: Crops, size: int) -> Tensor:
    """Resize crops as `interpolate` with antialiasing does, to uint8 [B, 3, size, size].

    Antialiased bilinear resizing is linear and separable: a product with one matrix per axis and image. In fp16, whose
    products GPUs sum in float32, gray levels differ by less than a quarter before they are rounded.
    """
    offsets, heights, widths = crops.places.unbind(1)
    rows = torch.arange(crops.height, device=offsets.device)
    # A window of `width` pixels from the first of each row. What follows a shorter row has weight zero.
    starts = offsets[:, None] + torch.minimum(rows, heights[:, None] - 1) * 3 * widths[:, None]
    windows = crops.bytes.unfold(0, 3 * crops.width, 1)[starts]
    pixels = windows.view(len(starts), crops.height, crops.width, 3).transpose(2, 3).half()  # [B, H, 3, W]
    across, down = weights(widths, crops.width, size), weights(heights, crops.height, size)
    narrow = pixels.flatten(1, 2) @ across.transpose(1, 2)  # [B, H x 3, size]
    resized = down @ narrow.view(len(starts), crops.height, 3 * size)  # [B, size, 3 x size]
    resized = resized.round_().clamp_(0, 255).byte().view(-1, size, 3, size)
    return resized.transpose(1, 2).contiguous()


def weights(lengths: Tensor, longest: int, size: int) -> Tensor:
    """The matrices [B, size, longest] that resize axes of different lengths [B] to one size."""
    lengths = lengths[:, None, None]
    centers = (torch.arange(size, device=lengths.device)[:, None] + 0.5) * lengths / size
    places = torch.arange(longest, device=lengths.device)
    places = torch.where(places < lengths, places + 0.5, torch.inf)
    reach = (lengths / size).clamp(min=1)
    # Few passes over what is as large as the result.
    triangle = (places / reach - centers / reach).abs_().half().neg_().add_(1).relu_()
    return triangle.div_(triangle.sum(2, keepdim=True, dtype=torch.float32))


class ResizeCrops(ItemTransform):
    """Resizes the crops of a `CropsDL` batch as `FileCropFlip` does: uint8 [B, 3, size, size]."""

    order, is_prefetched = -50, True  # right after Unreadable

    def __init__(self, size: int):
        self.size = size

    def encodes(self, batch):
        crops, labels = batch
        return TensorImage(resize_crops(Crops(*crops), self.size)), labels
