"""Closing the gates during training."""

from fastai.callback.core import Callback
from fastai.metrics import ValueMetric

from ...layers.gate_schedule import dgc_layers, gate_penalty, set_progress


class AnnealGates(Callback):
    """Closes the gates as training advances, adds their penalty to the loss, and logs both.

    Every training step sets the model's progress to `pct_train`, the share of the current `fit` that is
    done, and adds `lasso` x `gate_penalty(model)` to the loss that is differentiated, but not to the one
    that is logged. Every epoch logs three columns: `inactive`, the share of all gated input channels that
    are dropped; `lasso`, the penalty's mean over the epoch, not weighted; `lr`, the learning rate.

    `lr_find` leaves the gates where they are, and so does training layers whose gates are frozen: in `fine_tune`
    they close after the body is unfrozen. A model without DGC layers trains as it would without the callback.

    Args:
        lasso: weight of the penalty (lambda in the paper, which takes 1e-5).
        anneal: move the gates; without, all stay where they are, as when a network is trained further whose
            gates have closed.
    """

    order = 5  # before GradientAccumulation (6) divides the loss and MixedPrecision (10) scales it

    def __init__(self, lasso: float = 1e-5, anneal: bool = True):
        self.lasso, self.anneal = lasso, anneal
        self.columns = [
            ValueMetric(self._inactive, "inactive"),
            ValueMetric(self._mean_penalty, "lasso"),
            ValueMetric(self._learning_rate, "lr"),
        ]

    def before_fit(self):
        self._remove_columns()  # of a fit that was interrupted
        self.penalty, self.steps = 0.0, 0
        self.learn.metrics = self.learn.metrics + self.columns  # Recorder (50) fixes the columns next

    def before_train(self):
        self.penalty, self.steps = 0.0, 0

    def before_batch(self):
        if self.training and self.anneal and not hasattr(self.learn, "lr_finder"):
            # fastai adds up pct_train step by step. Its rounding error is enough to turn an exact half, and with
            # it the number of channels, the other way, so take the nearest whole number of steps.
            steps = self.n_iter * self.n_epoch
            progress = round(self.pct_train * steps) / steps
            for layer in dgc_layers(self.model):
                if layer.gates.bias.requires_grad:
                    set_progress(layer, progress)

    def after_loss(self):
        if not self.training:
            return
        penalty = gate_penalty(self.model)
        self.learn.loss_grad = self.learn.loss_grad + self.lasso * penalty
        self.latest = penalty.detach()

    def before_backward(self):  # not of a batch that is left out
        self.penalty, self.steps = self.penalty + self.latest, self.steps + 1

    def before_validate(self):
        if not self.steps:  # `validate` and `get_preds` announce a fit, too, but train nothing
            self._remove_columns()

    def after_fit(self):
        self._remove_columns()

    def _remove_columns(self):
        self.learn.metrics = [metric for metric in self.learn.metrics if metric not in self.columns]

    def _inactive(self) -> float:
        layers = dgc_layers(self.model)
        channels = sum(layer.in_channels for layer in layers)
        return sum(int(layer.inactive_channels) for layer in layers) / channels if channels else 0.0

    def _mean_penalty(self) -> float:
        return float(self.penalty / self.steps)

    def _learning_rate(self) -> float:
        return float(self.opt.hypers[-1]["lr"])
