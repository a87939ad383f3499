"""Closing the gates during training."""

from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.metrics import ValueMetric

from ...layers.gate_schedule import dgc_layers, gate_penalty, set_progress
from ..collectives import all_reduce_mean
from .order import ANNEAL_GATES


class AnnealGates(Callback):
    """Closes the gates as training advances, adds their penalty to the loss, and logs both.

    Every training step sets the model's progress to `pct_train`, the finished share of the current `fit`, and adds
    `lasso_weight` x `gate_penalty(model)` to the loss that is differentiated, but not to the loss that is logged. Every
    epoch logs three columns: `inactive`, the share of all gated input channels that are dropped; `gate_penalty`, its
    unweighted mean over the steps of the epoch; `lr`, the learning rate.

    `lr_find` does not move the gates, and neither does training while they are frozen: in `fine_tune`, they close after
    the body is unfrozen. A model without DGC layers trains as it would without the callback.

    Args:
        lasso_weight: weight of the penalty (lambda in the paper, which uses 1e-5).
        anneal: move the gates. False keeps them where they are, as for further training of a network whose gates have
            closed.

    Source: Dynamic Group Convolution (Su, Fang et al., ECCV 2020) and the authors' training loop; `gate_schedule` has
    the schedule.
    """

    order = ANNEAL_GATES
    state_key = "anneal_gates"
    penalty_sum: Any
    steps: int

    def __init__(self, lasso_weight: float = 1e-5, anneal: bool = True):
        self.lasso_weight, self.anneal = lasso_weight, anneal
        self.columns = [
            ValueMetric(self._inactive, "inactive"),
            ValueMetric(self._mean_penalty, "gate_penalty"),
            ValueMetric(self._learning_rate, "lr"),
        ]

    def before_fit(self):
        self._remove_columns()  # of a fit that was interrupted
        self._reset_mean()
        self.learn.metrics = self.learn.metrics + self.columns  # Recorder (50) fixes the columns next

    def before_batch(self):
        if self.training and self.anneal and not hasattr(self.learn, "lr_finder"):
            # fastai adds pct_train up step by step. The rounding error can turn an exact half, and with it the number
            # of channels, the other way, so round to the nearest whole number of steps.
            steps = self.n_iter * self.n_epoch
            progress = round(self.pct_train * steps) / steps
            for layer in dgc_layers(self.model):
                if layer.gates.bias.requires_grad:
                    set_progress(layer, progress)

    def after_loss(self):
        if not self.training:
            return
        penalty = gate_penalty(self.model)
        self.learn.loss_grad = self.learn.loss_grad + self.lasso_weight * penalty
        self.latest = penalty.detach()

    def before_backward(self):  # not called for a batch that is skipped
        self.penalty_sum, self.steps = self.penalty_sum + self.latest, self.steps + 1

    def before_validate(self):
        if not self.steps:  # fastai also calls before_fit to validate, or predict, only
            self._remove_columns()

    def after_epoch(self):
        self._reset_mean()  # after Recorder has read it, and before a state is saved that begins the next epoch

    def after_fit(self):
        self._remove_columns()

    def average_over_processes(self) -> None:
        if self.steps:
            self.penalty_sum = all_reduce_mean(self.penalty_sum)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "penalty_sum": float(self.penalty_sum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.penalty_sum = state["steps"], torch.tensor(state["penalty_sum"])

    def _reset_mean(self):
        self.penalty_sum, self.steps = 0.0, 0

    def _remove_columns(self):
        self.learn.metrics = [metric for metric in self.learn.metrics if metric not in self.columns]

    def _inactive(self) -> float:
        layers = dgc_layers(self.model)
        channels = sum(layer.in_channels for layer in layers)
        return sum(int(layer.inactive_channels) for layer in layers) / channels if channels else 0.0

    def _mean_penalty(self) -> float:
        return float(self.penalty_sum / self.steps)

    def _learning_rate(self) -> float:
        return float(self.opt.hypers[-1]["lr"])
