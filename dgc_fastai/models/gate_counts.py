"""What the gates of a network keep, counted on its device while it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..layers.gate_schedule import dgc_layers
from ..utils.errors import UserError

__all__ = ["GateCounts", "LayerCounts", "evaluating", "named_dgc_layers", "watched_gates"]


def named_dgc_layers(model: nn.Module) -> dict[str, DynamicGroupConv2d]:
    """The DGC layers of a model by name, in the order of its modules.

    Raises:
        UserError: there is none.
    """
    network = getattr(model, "_orig_mod", model)  # of torch.compile
    found = {name: one for name, one in network.named_modules() if isinstance(one, DynamicGroupConv2d)}
    if not found:
        raise UserError(f"the network ({type(model).__name__}) has no DGC layers; nor has one that was deployed")
    return found


@contextmanager
def watched_gates(model: nn.Module) -> Iterator[list[Tensor | None]]:
    """Within this context, see what the gates keep. The network computes what it does without.

    Compiled parts of it run eagerly: torch.compile would not notice that somebody looks.

    Returns:
        A list with an entry for each DGC layer, in the order of `dgc_layers`: the kept gates [B, heads, C] of its last
        forward pass, those of dropped channels zero, or None before there was one.
    """
    layers = dgc_layers(model)
    before = [layer.gate_observer for layer in layers]
    kept: list[Tensor | None] = [None] * len(layers)
    for place, layer in enumerate(layers):
        layer.gate_observer = partial(kept.__setitem__, place)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield kept
    finally:
        for layer, observer in zip(layers, before):
            if observer is None:
                del layer.gate_observer
            else:
                layer.gate_observer = observer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context, a model is in evaluation mode and keeps no gradients; then all modes are as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


class LayerCounts(NamedTuple):
    """What the heads of a layer keep, over all images."""

    kept: np.ndarray
    """[classes, heads, C]: the number of images that keep a channel; one row if they have no classes."""
    images: np.ndarray
    """[classes]: the number of images."""
    together: np.ndarray
    """[heads, heads]: how many channels two heads both keep, summed over the images."""
    gate_mean: np.ndarray
    """[heads]: mean of the kept gates; NaN if none is."""
    gate_std: np.ndarray
    """[heads]: their standard deviation."""
    has_classes: bool


class GateCounts:
    """Counts of what all DGC layers keep, by class; their size does not depend on the number of images.

    Nothing here waits for the device. The columns of all layers, heads and channels stand side by side, so that a batch
    is a few operations for the whole network.

    Args:
        layers: of the network.
        classes: number of classes; None if images have none.
        device: of the network.
    """

    def __init__(self, layers: Sequence[DynamicGroupConv2d], classes: int | None, device: torch.device):
        self.shapes = [(layer.heads, layer.in_channels) for layer in layers]
        columns = sum(heads * channels for heads, channels in self.shapes)
        self.classes = classes
        # Counts in float32, which `index_add_` can add to at once, are exact up to 16.7 million images of a class. The
        # last row is for labels that are not among the classes.
        self.kept = torch.zeros((classes or 0) + 1, columns, device=device)
        self.images = torch.zeros((classes or 0) + 1, device=device)
        pairs = sum(heads**2 for heads, _ in self.shapes)
        self.together = torch.zeros(pairs, dtype=torch.long, device=device)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.sums, self.squares = torch.zeros(2, columns, dtype=wide, device=device)
        self.pivot: Tensor | None = None

    @torch.no_grad()
    def add(self, gates: Sequence[Tensor], labels: Tensor | None) -> None:
        """Count a batch.

        Args:
            gates: kept gates [B, heads, C] of every layer, those of dropped channels zero.
            labels: class numbers [B]; None if images have no classes.
        """
        with torch.autocast(self.kept.device.type, enabled=False):
            row = torch.cat([one.detach().float().flatten(1) for one in gates], 1)
            kept = row.sign()
            if labels is None or self.classes is None:
                labels = torch.zeros(len(row), dtype=torch.long, device=row.device)
            else:
                labels = labels.long()
                labels = labels.where((labels >= 0) & (labels < self.classes), self.classes)
            self.kept.index_add_(0, labels, kept)
            self.images.index_add_(0, labels, kept.new_ones(len(labels)))
            self.together += torch.cat([_common(part, *shape) for part, shape in self._by_layer(kept)]).long()
            if self.pivot is None:  # a variance is exact only if what is squared is small
                self.pivot = row.sum(0) / kept.sum(0).clamp(min=1)
            off = row.addcmul_(kept, self.pivot, value=-1)
            self.sums += off.sum(0)
            self.squares += off.square_().sum(0)

    def by_layer(self) -> list[LayerCounts]:
        """The counts of each layer, on the CPU; this waits for the device.

        Raises:
            ValueError: there were labels that are none of the classes.
        """
        images = self.images.round().long().cpu().numpy()
        if self.classes is not None:
            images, strange = images[:-1], images[-1]
            if strange:
                raise ValueError(f"{strange:,} labels are none of the {self.classes} classes, 0 to {self.classes - 1}")
        kept, together = self.kept[: len(images)].cpu(), self.together.cpu().numpy()
        pivot = self.sums if self.pivot is None else self.pivot
        moments = torch.stack([self.sums, self.squares, pivot.to(self.sums.dtype)]).cpu().double()
        found, pairs = [], 0
        for (one, (heads, channels)), (moment, _) in zip(self._by_layer(kept), self._by_layer(moments)):
            by_class = one.reshape(-1, heads, channels).round().long().numpy()
            mean, std = _mean_and_std(by_class.sum(0), moment.reshape(3, heads, channels).numpy())
            common = together[pairs : pairs + heads**2].reshape(heads, heads)
            found.append(LayerCounts(by_class, images, common, mean, std, self.classes is not None))
            pairs += heads**2
        return found

    def _by_layer(self, columns: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Each layer's columns, with its numbers of heads and channels."""
        parts = columns.split([heads * channels for heads, channels in self.shapes], 1)
        return zip(parts, self.shapes)


def _common(kept: Tensor, heads: int, channels: int) -> Tensor:
    """How many channels two heads both keep: zeros and ones [B, heads * C] -> sums over the images [heads * heads]."""
    rows = kept.view(-1, heads, channels).transpose(0, 1).flatten(1)
    return (rows @ rows.T).flatten()


def _mean_and_std(kept: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each head's kept gates [heads].

    Args:
        kept: [heads, C], how many of a channel's gates are kept.
        moments: [3, heads, C], the sums of their differences to a pivot, of the squares of these, and the pivots.
    """
    sums, squares, pivot = moments
    with np.errstate(invalid="ignore", divide="ignore"):
        count = kept.sum(1)
        mean = (sums + kept * pivot).sum(1) / count
        off = pivot - mean[:, None]  # squares around the mean of the head
        variance = (squares + 2 * off * sums + kept * off**2).sum(1) / count
    return mean, np.sqrt(np.maximum(variance, 0))
