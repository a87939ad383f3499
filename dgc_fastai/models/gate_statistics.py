"""Whether, and how, the gates of a network select by image."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from .gate_counts import GateCounts, LayerCounts, evaluating, named_dgc_layers, watched_gates
from .gate_measures import PER_HEAD, measure_layer

__all__ = ["GateStatistics", "LayerGates", "are_class_scores", "gate_statistics", "image_batches", "statistics_of"]

MAX_NUMBERS = 500_000
"""Of the table by class in `GateStatistics.to_dict`: a file of numbers should stay one that can be read."""


@dataclass(frozen=True)
class LayerGates:
    """What the heads of a DGC layer keep, over all images.

    Attributes:
        name: of the layer in its network.
        inactive: channels that each head drops.
        granularity: how many neighboring channels are kept or dropped together.
        counts: of images, by class, head and channel.
        measures: arrays [heads] by name, see `gate_measures`; NaN where not defined.
    """

    name: str
    inactive: int
    granularity: int
    counts: LayerCounts
    measures: dict[str, np.ndarray]

    @property
    def usage(self) -> np.ndarray:
        """Share of the images that keep a channel [heads, C]."""
        return self.counts.kept.sum(0) / self.counts.images.sum()

    def mean(self, measure: str) -> float:
        """A measure's mean over the heads for which it is defined; NaN if it is for none."""
        known = self.measures[measure][~np.isnan(self.measures[measure])]
        return float(known.mean()) if len(known) else float("nan")

    def to_dict(self, by_class: bool = True) -> dict[str, Any]:
        """As JSON; see `GateStatistics.to_dict`."""
        kept, images = self.counts.kept, self.counts.images
        never, always = kept.sum(0) == 0, kept.sum(0) == images.sum()
        by_head = {name: [_number(one) for one in self.measures[name]] for name in PER_HEAD}
        by_head |= {"never_kept": never.sum(1).tolist(), "always_kept": always.sum(1).tolist()}
        shares = kept / np.maximum(images, 1)[:, None, None]
        return {
            "name": self.name,
            "channels": kept.shape[2],
            "heads": kept.shape[1],
            "inactive": self.inactive,
            "granularity": self.granularity,
            **{name: _number(self.mean(name)) for name in PER_HEAD},
            "never_kept": np.flatnonzero(never.all(0)).tolist(),
            "always_kept": np.flatnonzero(always.all(0)).tolist(),
            "by_head": by_head,
            "usage": self.usage.round(4).tolist(),
            "usage_by_class": shares.round(4).tolist() if by_class else None,
        }


@dataclass(frozen=True)
class GateStatistics:
    """What the gates of a network do, from `gate_statistics`.

    Attributes:
        images: their number.
        classes: names of the classes; None if the images have none.
        accuracy: top-1 in [0, 1]; None without classes.
        layers: in the order of the network's modules.
    """

    images: int
    classes: list[str] | None
    accuracy: float | None
    layers: list[LayerGates]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON: docs/gates.md describes the keys. Numbers that are not defined are None."""
        numbers = sum(layer.counts.kept.size for layer in self.layers)
        by_class = self.classes is not None and numbers <= MAX_NUMBERS
        return {
            "images": self.images,
            "classes": self.classes,
            "images_per_class": None if self.classes is None else self.layers[0].counts.images.tolist(),
            "accuracy": self.accuracy,
            "layers": [layer.to_dict(by_class) for layer in self.layers],
        }


def gate_statistics(model: nn.Module, dataloader: Iterable, classes: Sequence[str] | None = None) -> GateStatistics:
    """Run a network over images once and count what its gates keep.

    For each layer and head: how often each channel is kept, how unequal images are in this, how much the class tells of
    it, how far heads, and images, keep the same channels. docs/gates.md defines each measure. The memory that it needs
    does not depend on the number of images, and it does not wait for a GPU before the end. The network runs in
    evaluation mode, and is left as it was.

    Args:
        model: a network with DGC layers, which maps images [B, C, H, W] to scores [B, classes], on any device.
        dataloader: batches (images, class numbers [B], ...), as PyTorch's, fastai's and timm's loaders yield. If there
            are images only, or labels of another kind, what needs classes is not defined.
        classes: names of the classes; by default those that the loader or its dataset has, or numbers.

    Raises:
        UserError: the network has no DGC layers.
        ValueError: not all of them ran once for each image; there are no images; `classes` are not as many as the
            network's scores; or there are labels that are none of the classes.
        TypeError: a batch is not of that form.
    """
    layers = named_dgc_layers(model)
    counts, right = None, torch.zeros((), dtype=torch.long)
    device = next(model.parameters()).device
    with evaluating(model), watched_gates(model) as kept:
        for images, labels in image_batches(dataloader, device):
            kept[:] = [None] * len(layers)
            scores = model(images)
            gates = [_of_all_images(gates, len(images), name) for name, gates in zip(layers, kept)]
            if not are_class_scores(scores):
                labels = None
            if counts is None:
                counts = GateCounts(list(layers.values()), None if labels is None else scores.shape[1], device)
                right = right.to(device)
            if (labels is None) != (counts.classes is None):
                raise ValueError("some batches have class numbers, and others have none")
            counts.add(gates, labels)
            if labels is not None:
                right += (scores.argmax(1) == labels).sum()
    if counts is None:
        raise ValueError("there are no images to look at the gates with")
    if classes is None:
        classes = _class_names(dataloader, counts.classes)
    return statistics_of(model, counts, classes, right)


def statistics_of(
    model: nn.Module, counts: GateCounts, classes: Sequence[str] | None = None, right: Tensor | None = None
) -> GateStatistics:
    """The statistics of a network from what was counted; this waits for the device.

    Args:
        classes: their names; numbers if None.
        right: how many images are classified correctly.

    Raises:
        ValueError: `classes` are not as many as were counted, or there were labels that are none of them.
    """
    found = []
    for (name, layer), counted in zip(named_dgc_layers(model).items(), counts.by_layer()):
        inactive = int(layer.inactive_channels)
        measures = measure_layer(counted, layer.in_channels - inactive)
        found.append(LayerGates(name, inactive, layer.granularity, counted, measures))
    total, known = int(found[0].counts.images.sum()), counts.classes
    if known is None:
        return GateStatistics(total, None, None, found)
    if classes is not None and len(classes) != known:
        raise ValueError(f"{len(classes)} names for the network's {known} classes")
    names = [str(name) for name in (range(known) if classes is None else classes)]
    return GateStatistics(total, names, None if right is None else int(right) / total, found)


def image_batches(dataloader: Iterable, device: torch.device) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Images [B, ...] and class numbers [B] of every batch, on a device; None if it has no class numbers.

    Raises:
        TypeError: a batch is neither a tensor nor a tuple or list that begins with one.
    """
    for batch in dataloader:
        parts = batch if isinstance(batch, (tuple, list)) else [batch]
        if not parts or not isinstance(parts[0], Tensor):
            raise TypeError(f"a batch has to be images, or (images, class numbers), and is {type(batch).__name__}")
        # Plain tensors: those of fastai cost time at every operation.
        images = parts[0].as_subclass(Tensor).to(device, non_blocking=True)
        labels = parts[1] if len(parts) > 1 else None
        if not len(images):
            continue
        if isinstance(labels, Tensor) and labels.dim() == 1 and not (labels.is_floating_point() or labels.is_complex()):
            yield images, labels.as_subclass(Tensor).to(device, non_blocking=True)
        else:
            yield images, None


def are_class_scores(scores: Any) -> bool:
    """Whether a network's output is [B, classes], with more than one class."""
    return isinstance(scores, Tensor) and scores.dim() == 2 and scores.shape[1] > 1


def _of_all_images(gates: Tensor | None, images: int, name: str) -> Tensor:
    if gates is None:
        raise ValueError(f"{name} did not run, so its gates are not known")
    if len(gates) != images:
        raise ValueError(f"{name} ran with {len(gates)} samples for {images} images; its gates are not those of images")
    return gates


def _class_names(dataloader: Any, count: int | None) -> Sequence[str] | None:
    """So many names that a loader or its dataset has."""
    for holder in (dataloader, getattr(dataloader, "dataset", None)):
        for attribute in ("vocab", "classes"):
            names: Any = getattr(holder, attribute, None)
            if hasattr(names, "__len__") and not isinstance(names, (str, dict)) and len(names) == count:
                return list(names)
    return None


def _number(value: float) -> float | None:
    return round(float(value), 5) if np.isfinite(value) else None
