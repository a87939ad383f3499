"""What single images select: a sample of them, those that differ most, and a map of all."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from ..models.gate_counts import evaluating, watched_gates
from ..models.gate_statistics import image_batches

__all__ = ["GateSamples", "most_dissimilar", "plane_of", "sample_gates"]

THUMBNAIL = 64  # largest side in pixels
Statistics = tuple[Sequence[float], Sequence[float]]


class GateSamples(NamedTuple):
    """What each of some images selects."""

    pictures: np.ndarray
    """[images, height, width, 3], bytes."""
    labels: np.ndarray | None
    """[images]; None without classes."""
    kept: np.ndarray
    """[images, columns], bool: the channels of all heads of all layers, side by side."""
    shapes: list[tuple[int, int]]
    """Heads and channels of each layer."""


def sample_gates(model: nn.Module, dataloader: Iterable, statistics: Statistics, most: int = 512) -> GateSamples:
    """Run a network over the first images of a loader, and keep what they select.

    Args:
        model: a network with DGC layers.
        dataloader: as for `gate_statistics`.
        statistics: mean and standard deviation of each color that the loader has normalized images with.
        most: number of images.
    """
    device = next(model.parameters()).device
    pictures, classes, selections, count = [], [], [], 0
    shapes: list[tuple[int, int]] = []
    with evaluating(model), watched_gates(model) as gates:
        for images, labels in image_batches(dataloader, device):
            model(images)
            layers = [one for one in gates if one is not None]
            shapes = [(one.shape[1], one.shape[2]) for one in layers]
            kept = torch.cat([(one != 0).flatten(1) for one in layers], 1)
            pictures.append(_as_pictures(images, statistics))
            selections.append(kept)
            if labels is not None:
                classes.append(labels)
            count += len(images)
            if count >= most:
                break
    numbers = _first(classes, most) if classes else None
    return GateSamples(_first(pictures, most), numbers, _first(selections, most), shapes)


def _first(parts: list[Tensor], most: int) -> np.ndarray:
    return torch.cat(parts)[:most].cpu().numpy()


def _as_pictures(images: Tensor, statistics: Statistics) -> Tensor:
    """Normalized images as small pictures of bytes [B, h, w, 3]."""
    mean, std = (images.new_tensor(one).view(1, -1, 1, 1) for one in statistics)
    shares = (images.detach() * std + mean).clamp(0, 1)
    step = -(-max(images.shape[2:]) // THUMBNAIL)
    if step > 1:
        shares = F.avg_pool2d(shares, step)
    if shares.shape[1] != 3:
        shares = shares.mean(1, keepdim=True)
    return (255 * shares).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)


def most_dissimilar(kept: np.ndarray, count: int) -> list[int]:
    """Images whose selections are far from each other: the two that have the fewest kept channels in common, and each
    next one as far as can be from all of these.

    Args:
        kept: [images, columns], bool.
        count: how many; fewer if there are no more different ones.
    """
    as_floats = kept.astype(np.float32)
    each = as_floats.sum(1)
    distance = each[:, None] + each - 2 * as_floats @ as_floats.T  # channels that one of two images keeps
    chosen = list(map(int, np.unravel_index(distance.argmax(), distance.shape)))
    while len(chosen) < count:
        nearest = distance[chosen].min(0)
        if nearest.max() == 0:
            break
        chosen.append(int(nearest.argmax()))
    return list(dict.fromkeys(chosen))


def plane_of(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The principal components of selections: the images' places [images, 2], and the share of the variance along each
    axis; None if fewer than three selections differ.

    Args:
        kept: [images, columns], bool.
    """
    varied = kept[:, kept.any(0) & ~kept.all(0)].astype(np.float32)
    if len(np.unique(varied, axis=0)) < 3 or varied.shape[1] < 2:
        return None
    pca = PCA(2, random_state=0)
    return pca.fit_transform(varied), pca.explained_variance_ratio_
