"""fastai callbacks for DGC networks."""

import json
import logging
import math

import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import CutMix, MixHandler, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.metrics import ValueMetric
from fastai.torch_core import get_model
from timm.utils import ModelEmaV3

from . import launch
from .conv import dgc_layers, gate_penalty, set_progress
from .distributed import gather, largest

__all__ = [
    "AnnealGates",
    "AverageWeights",
    "DeviceMixedPrecision",
    "MixUpOrCutMix",
    "NonFiniteLoss",
    "WholeBatchAccumulation",
]


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


class AverageWeights(Callback):
    """Averages the weights over the steps, exponentially; validates, and ends the fit, with the average.

    timm's ModelEmaV3, whose decay grows to `decay`, so that short runs do not average their first steps in. Gate
    progress is a count, and is copied.

    Args:
        decay: share of the average that a step leaves as it was, such as 0.999.
    """

    order = 20  # after MixedPrecision (10)

    def __init__(self, decay: float):
        self.decay, self.average = decay, None

    @property
    def averaged(self) -> torch.nn.Module:
        """The network with averaged weights during a fit; the learner's own otherwise."""
        return self.average.module if self.average else get_model(self.learn.model)

    def before_fit(self):
        self.average, self.updates = None, 0

    def before_train(self):
        if self.average is None:  # not where a fit is announced to validate only
            self.average = ModelEmaV3(get_model(self.model), self.decay, use_warmup=True)
        self.training_model = self.model

    def after_step(self):
        self.updates += 1
        self.average.update(get_model(self.model), self.updates)

    def before_validate(self):
        if self.average:
            self.learn.model = self.averaged

    def after_validate(self):
        if self.average:
            self.learn.model = self.training_model

    after_cancel_validate = after_validate

    def after_fit(self):
        if self.average:
            self.learn.model = get_model(self.training_model)  # a fit can be cancelled while it validates
            self.model.load_state_dict(self.average.module.state_dict())
            self.average = None


class MixUpOrCutMix(MixHandler):
    """fastai's MixUp or its CutMix, whichever a coin says, batch by batch.

    Args:
        mixup, cutmix: alpha of each one's beta distribution.
    """

    def __init__(self, mixup: float, cutmix: float):
        super().__init__()
        self.choices = MixUp(mixup), CutMix(cutmix)

    def before_batch(self):
        choice = self.choices[int(torch.rand(()) < 0.5)]
        choice.learn, choice.stack_y = self.learn, self.stack_y
        choice.before_batch()
        self.lam, self.yb1 = choice.lam, choice.yb1


class WholeBatchAccumulation(GradientAccumulation):
    """fastai's GradientAccumulation, counting the images of a batch in all processes."""

    def after_loss(self):
        self.learn.loss_grad = self.learn.loss_grad * (self.dl.size(self.iter) / self.n_acc)

    def before_step(self):
        self.count += self.dl.size(self.iter)
        if self.count < self.n_acc:
            raise CancelBatchException  # no step, and the gradients stay
        self.count = 0


class DeviceMixedPrecision(MixedPrecision):
    """fastai's MixedPrecision on the network's device, which may be a CPU."""

    def before_fit(self):
        device = next(self.model.parameters()).device.type
        dtype = {AMPMode.BF16: torch.bfloat16, AMPMode.FP16: torch.float16}[self.amp_mode]
        if device == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise ValueError("this GPU has no bfloat16: use float32 or fp16")
        self.kwargs["enabled"] = dtype is torch.float16
        self.autocast, self.scales = torch.autocast(device, dtype), []
        self.learn.scaler = torch.amp.GradScaler(device, **self.kwargs)


class NonFiniteLoss(Callback):
    """Ends a fit at a loss that is infinite or no number, or leaves that batch out.

    A batch that is left out changes neither weights nor the statistics of norms. When `MOST` come in a row it is the
    weights that are broken, and the fit ends. Of several processes, all do the same. After a fit that has ended so,
    `problem` says why, and `images` are the names of the batch's images.

    Args:
        skip: leave such batches out.
    """

    order = 51  # after MixedPrecision (10) has left autocast, and Recorder (50) has waited for the loss anyway
    MOST = 10

    def __init__(self, skip: bool = False):
        self.skip = skip

    def before_fit(self):
        self.in_a_row, self.problem, self.images = 0, None, []

    def before_batch(self):
        if self.training and self.skip:
            self.buffers = [(one, one.clone()) for one in self.model.buffers()]

    def after_loss(self):
        if not (self.training and self.skip):
            return
        self.in_a_row = self.in_a_row + 1 if largest(int(not self.loss.isfinite())) else 0
        if not self.in_a_row:
            return
        problem, images = self._describe()
        if self.in_a_row == self.MOST:
            self._end(f"{problem}, as in the {self.MOST - 1} batches before", images)
        if launch.is_first():
            logging.getLogger(__name__).warning("left out a batch: %s", problem)
        with torch.no_grad():
            for one, before in self.buffers:
                one.copy_(before)
        self.learn.yb = ()  # Recorder is to take nothing in
        raise CancelBatchException

    def after_batch(self):
        # Recorder's loss is the mean of all processes' losses, so all of them come here.
        if self.training and not self.skip and not math.isfinite(self.recorder.smooth_loss.val):
            self._end(*self._describe())

    def after_train(self):
        if not torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all():
            self._end(f"the weights are not finite any more at the end of epoch {self.epoch + 1}", [])

    def _end(self, problem: str, images: list[str]):
        self.problem, self.images = problem, images
        raise CancelFitException

    def _describe(self) -> tuple[str, list[str]]:
        """What is wrong with this batch, and the images of those processes where something is."""
        loss = float(self.loss)
        mine = [] if math.isfinite(loss) else self.dls.train.batch_names(self.iter)
        parts = [json.loads(part) for part in gather(json.dumps([str(loss), mine]).encode())]
        images = [name for _, names in parts for name in names]
        shown = ", ".join(images[:3]) + (f" and {len(images) - 3} more" if len(images) > 3 else "")
        loss = next(loss for loss, names in parts if names)
        step = self.epoch * self.n_iter + self.iter + 1
        where = f"step {step:,} (epoch {self.epoch + 1}, batch {self.iter + 1})"
        return f"the loss is {loss} at {where}, of the images {shown}", images
