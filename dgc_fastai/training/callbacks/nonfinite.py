"""Losses that are NaN or Inf."""

import json
import logging
import math

import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException

from ...utils import launch
from ..distributed import gather, largest


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
        if launch.is_main_process():
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
