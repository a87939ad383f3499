"""What a network loses with gates that are not those of its image. No training is needed to find out."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..models.gate_counts import evaluating, named_dgc_layers
from ..models.gate_statistics import are_class_scores, image_batches
from ..ops.gates import drop_smallest

__all__ = ["Kind", "gate_controls", "replaced_gates"]

Kind = Literal["another_image", "mean", "input_free"]


@contextmanager
def replaced_gates(model: nn.Module, kind: Kind) -> Iterator[None]:
    """Within this context, every DGC layer convolves with other gates than its own, in evaluation and in training.

    Each layer computes its gates as always, from its own input, and drops the smallest. Then:

    - "another_image": image i of the batch gets the kept gates of image i - 1, the first one those of the last. Where a
      loader does not shuffle, neighbors may be of the same class.
    - "mean": all images get the mean over the batch of the kept gates, those of dropped channels counted as zero. Of
      this mean, again the same number of channels is dropped, the smallest.
    - "input_free": all images get the gates of an image whose pooled features are zero, `relu(b)`. They are learned in
      training, as one fixed selection for each head: the control that a network which selects by image has to beat.

    Gradients, and the gate penalty, are those of the gates that are used. Compiled parts of the network run eagerly. On
    a GPU, plain PyTorch computes the gates in place of the kernels of whole layers, whose rounding differs.

    Args:
        model: a network with DGC layers.
        kind: see above.

    Raises:
        UserError: the network has no DGC layers.
        ValueError: there is no such kind; in the forward pass, a batch of one image has no other image.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"no kind of gates {kind!r}; there are {', '.join(get_args(Kind))}")
    hooks = [
        layer.gates.register_forward_hook(partial(_REPLACE[kind], layer)) for layer in named_dgc_layers(model).values()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _roll(layer: DynamicGroupConv2d, gates: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if len(output) == 1:
        raise ValueError("a batch of one image has no other image whose gates it could get")
    return output.roll(1, 0)  # the layer drops the smallest of each row next


def _mean(layer: DynamicGroupConv2d, gates: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return drop_smallest(output, layer.inactive_channels, layer.granularity).mean(0, keepdim=True).expand_as(output)


def _input_free(layer: DynamicGroupConv2d, gates: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return layer.gates.bias.float().relu().expand_as(output)


_REPLACE = {"another_image": _roll, "mean": _mean, "input_free": _input_free}


def gate_controls(model: nn.Module, dataloader: Iterable) -> dict[str, Any]:
    """Top-1 with the gates of another image and with the batch's mean gates, beside that with the network's own.

    One pass over the data, in evaluation mode; see `replaced_gates`. Accuracies are compared image by image. A batch of
    one image is left out.

    Args:
        model: a network with DGC layers, which maps images [B, C, H, W] to scores [B, classes], on any device.
        dataloader: batches (images, class numbers [B], ...), best in random order.

    Returns:
        JSON: "images"; "own", an accuracy in [0, 1]; for "another_image" and "mean" their "accuracy", its "difference"
        to "own", and the "standard_error" of that; and "same_class", how often the other image is of the same class.

    Raises:
        UserError: the network has no DGC layers.
        ValueError: there are no class numbers or class scores, or no batch of two images.
    """
    named_dgc_layers(model)
    kinds: tuple[Kind, ...] = ("another_image", "mean")
    device = next(model.parameters()).device
    images, totals = 0, torch.zeros(6, dtype=torch.long, device=device)
    with evaluating(model):
        for x, labels in image_batches(dataloader, device):
            if labels is None:
                raise ValueError("the accuracy with other gates needs batches with class numbers")
            if len(x) == 1:
                continue
            own = _is_right(model(x), labels)
            counts = [own.sum(), (labels == labels.roll(1)).sum()]
            for kind in kinds:
                with replaced_gates(model, kind):
                    other = _is_right(model(x), labels)
                counts += [other.sum(), (other != own).sum()]
            totals += torch.stack(counts)
            images += len(x)
    if not images:
        raise ValueError("the gates of another image need batches of two images or more")
    right, same, *rest = totals.tolist()
    controls: dict[str, Any] = {"images": images, "own": right / images}
    for kind, (other, unequal) in zip(kinds, (rest[:2], rest[2:])):
        controls[kind] = _compared(other, right, unequal, images)
    controls["another_image"]["same_class"] = same / images
    return controls


def _is_right(scores: Any, labels: Tensor) -> Tensor:
    if not are_class_scores(scores):
        raise ValueError("the accuracy with other gates needs a network with scores [B, classes]")
    return scores.argmax(1) == labels


def _compared(other: int, own: int, unequal: int, images: int) -> dict[str, float]:
    """Two accuracies on the same images, of which `unequal` are right in one case only."""
    difference = (other - own) / images
    variance = unequal / images - difference**2
    return {"accuracy": other / images, "difference": difference, "standard_error": (variance / images) ** 0.5}
