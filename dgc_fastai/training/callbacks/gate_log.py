"""What the gates do, epoch by epoch, for the services that a run logs to."""

import logging

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.torch_core import get_model
from matplotlib import colormaps
from torch import Tensor, nn

from ...models.gate_measures import PER_HEAD
from ...models.gate_statistics import GateStatistics, gate_statistics
from .order import DIAGNOSIS

_logger = logging.getLogger(__name__)

MOST_IMAGES, MOST_BYTES = 256, 2**26
BY_LAYER = ("usage_entropy", "class_share", "overlap_heads")
WIDTH = 800  # of the picture in pixels, about


class GateLog(Callback):
    """After each validation, `numbers` and `picture` say what the gates do with some of the images.

    It runs the network once more, on at most `MOST_IMAGES` images from all over the validation set. Training does not
    notice: the network is in evaluation mode, and no random number is drawn.

    Attributes:
        numbers: by name; "gates/" for means over the layers, "gates_by_layer/" for single ones. Those that are not
            defined are left out.
        picture: [rows, columns, 3] in bytes, a row for each head of each layer, a column for each channel; the
            brighter, the more images keep it. None before there was a validation.
    """

    order = DIAGNOSIS

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self.picture: np.ndarray | None = None

    def before_validate(self):
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.taken = 0

    def after_pred(self):
        if self.training:
            return
        self.network = get_model(self.model)  # the one that is validated, which may be that of averaged weights
        images, labels = (one[0].as_subclass(Tensor) for one in (self.xb, self.yb))
        most = min(MOST_IMAGES, max(1, MOST_BYTES // (images[0].numel() * images.element_size())))
        count = min(len(images), most * (self.iter + 1) // self.n_iter - self.taken)  # as many of each batch
        if count > 0:
            self.images.append(images[:count].clone())
            self.labels.append(labels[:count].clone())
            self.taken += count

    def after_validate(self):
        if self.images:
            images, labels = torch.cat(self.images), torch.cat(self.labels)
            batches = zip(images.split(self.dl.bs), labels.split(self.dl.bs))
            try:
                statistics = gate_statistics(self.network, batches)
            except ValueError as error:  # a layer that sees parts of images, or does not run: no reason to stop a run
                _logger.warning("the gates are not logged: %s", error)
            else:
                self.numbers, self.picture = log_numbers(statistics), log_picture(statistics)
        self.after_cancel_validate()

    def after_cancel_validate(self):
        self.images, self.labels, self.network = [], [], nn.Identity()


def log_numbers(statistics: GateStatistics) -> dict[str, float]:
    """Measures by name, as means over heads, and over layers; see `GateLog.numbers`."""
    found = {}
    for measure in PER_HEAD:
        values = {layer.name: layer.mean(measure) for layer in statistics.layers}
        found[f"gates/{measure}"] = float(np.mean([*values.values()]))
        if measure in BY_LAYER:
            found |= {f"gates_by_layer/{measure}/{name}": value for name, value in values.items()}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def log_picture(statistics: GateStatistics) -> np.ndarray:
    """How often each channel is kept; see `GateLog.picture`."""
    usages = [layer.usage for layer in statistics.layers]
    widest = max(usage.shape[1] for usage in usages)
    rows = np.full((sum(map(len, usages)), widest, 3), 230, np.uint8)
    start = 0
    for usage in usages:
        colors = colormaps["viridis"](usage, bytes=True)[..., :3]
        rows[start : start + len(usage), : usage.shape[1]] = colors
        start += len(usage)
    scale = max(1, WIDTH // widest)
    return rows.repeat(scale, 0).repeat(scale, 1)
