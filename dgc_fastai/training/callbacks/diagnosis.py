"""Watching a run for what its numbers do not show."""

import math
from dataclasses import asdict
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.torch_core import get_model
from torch import Tensor, nn

from ...layers.dynamic_group_conv import DynamicGroupConv2d
from ...utils import launch
from ..collectives import all_reduce_mean
from ..diagnosis import Findings
from .order import DIAGNOSIS


class Diagnosis(Callback):
    """Collects `findings`, for `diagnosis.problems`: the validation images of each class, the first layer that
    overflows, and layers whose gates are all zero.

    It waits for the device once an epoch. The layer that overflows is looked for once in a run, at the end of the first
    epoch whose validation loss is NaN or Inf: that takes another pass over the validation images, in float32.

    Args:
        classes: number of classes.
    """

    order = DIAGNOSIS
    state_key = "diagnosis"

    def __init__(self, classes: int):
        self.classes = classes
        self.findings = Findings()
        self.counts: Tensor | None = None
        self.searched = False

    def before_validate(self):
        if not self.findings.images:
            self.counts = torch.zeros(self.classes, device=self.dls.device)

    def after_pred(self):
        if not self.training and self.counts is not None:
            labels = self.yb[0].as_subclass(Tensor)
            self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=self.counts.dtype))

    def after_validate(self):
        if self.counts is not None:
            counts = all_reduce_mean(self.counts) * launch.world_size()
            self.findings.images, self.counts = [round(count) for count in counts.tolist()], None

    def after_train(self):
        layers = [(name, one) for name, one in get_model(self.model).named_modules() if _was_trained(one)]
        if layers:
            sums = torch.stack([layer.penalty.detach().sum() for _, layer in layers])
            self.findings.closed = [name for (name, _), total in zip(layers, sums.tolist()) if total == 0]

    def after_epoch(self):
        row = dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:]))
        if not self.searched and not math.isfinite(row["valid_loss"]):
            self.searched = True
            self.findings.overflowed = self._first_overflow()

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self.findings), "searched": self.searched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.searched = state.pop("searched")
        vars(self.findings).update(state)  # in place: the run recorder reads them

    @torch.no_grad()
    def _first_overflow(self) -> str | None:
        average = getattr(self, "average_weights", None)
        network = average.averaged if average else get_model(self.model)  # the one that was validated
        first: list[str] = []

        def watch(name: str):
            def look(module: nn.Module, inputs: tuple, output: Any) -> None:
                if not first and isinstance(output, Tensor) and not output.isfinite().all():
                    first.append(name)

            return look

        hooks = [one.register_forward_hook(watch(name)) for name, one in network.named_modules() if _computes(one)]
        was_training = network.training
        network.eval()
        try:
            for batch in self.dls.valid:
                network.forward(batch[0])  # not __call__, which may be compiled
                if first:
                    break
        finally:
            for hook in hooks:
                hook.remove()
            network.train(was_training)
        return first[0] if first else None


def _was_trained(module: nn.Module) -> bool:
    return isinstance(module, DynamicGroupConv2d) and module.penalty is not None


def _computes(module: nn.Module) -> bool:
    """Whether a module is a layer, rather than one that holds layers. The parts of a DGC layer come before it."""
    return isinstance(module, DynamicGroupConv2d) or not list(module.children())
