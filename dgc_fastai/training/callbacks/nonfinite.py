"""Losses that are NaN or Inf."""

import json
import logging
import math
from typing import Any

import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException

from ...utils import launch
from ..collectives import all_gather_bytes, all_reduce_max
from .order import NON_FINITE_LOSS


class NonFiniteLoss(Callback):
    """Ends a fit at a loss of NaN or Inf, or skips that batch.

    A skipped batch changes neither weights nor the statistics of normalization layers. After `MAX_IN_A_ROW` such
    batches it is the weights that are broken, and the fit ends. Several processes all do the same. After a fit that has
    ended so, `problem` is the reason, and `images` are the names of the batch's images.

    Args:
        skip: skip such batches.
    """

    order = NON_FINITE_LOSS
    state_key = "non_finite_loss"
    MAX_IN_A_ROW = 10

    def __init__(self, skip: bool = False):
        self.skip = skip

    def before_fit(self):
        self.in_a_row, self.problem, self.images = 0, None, []

    def before_train(self):
        buffers = list(self.model.buffers()) if self.skip else []
        # By type, so that a GPU copies all of one type at once.
        same_type = [[one for one in buffers if one.dtype is kind] for kind in {one.dtype for one in buffers}]
        self.saved_buffers = [(group, [torch.empty_like(one) for one in group]) for group in same_type]

    def before_batch(self):
        if self.training:
            for buffers, saved in self.saved_buffers:
                torch._foreach_copy_(saved, buffers)

    def after_loss(self):
        if not self.training:
            return
        with torch.no_grad():  # a teacher or a penalty is in loss_grad alone: its NaN or Inf makes the loss NaN
            self.learn.loss = self.loss + 0 * self.loss_grad
        if not self.skip:
            return
        self.in_a_row = self.in_a_row + 1 if all_reduce_max(int(not self.loss.isfinite())) else 0
        if not self.in_a_row:
            return
        problem, images = self._describe()
        if self.in_a_row == self.MAX_IN_A_ROW:
            self._end(f"{problem}, as in the {self.MAX_IN_A_ROW - 1} batches before", images)
        if launch.is_main_process():
            logging.getLogger(__name__).warning("skipped a batch: %s", problem)
        with torch.no_grad():
            for buffers, saved in self.saved_buffers:
                torch._foreach_copy_(buffers, saved)
        self.learn.yb = ()  # so that Recorder ignores the batch
        raise CancelBatchException

    def after_batch(self):
        # The logged loss is smoothed and reduced over processes, so all processes come here together.
        if self.training and not self.skip and not math.isfinite(self.recorder.smooth_loss.val):
            self._end(*self._describe())

    def after_train(self):
        if not torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all():
            self._end(f"the weights are NaN or Inf at the end of epoch {self.epoch + 1}", [])

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]

    def _end(self, problem: str, images: list[str]):
        self.problem, self.images = problem, images
        raise CancelFitException

    def _describe(self) -> tuple[str, list[str]]:
        """What is wrong with this batch, and the images of those processes where it is."""
        loss = float(self.loss)
        own = [] if math.isfinite(loss) else self.dls.train.batch_names(self.iter)
        parts = [json.loads(part) for part in all_gather_bytes(json.dumps([str(loss), own]).encode())]
        images = [name for _, names in parts for name in names]
        shown = ", ".join(images[:3]) + (f" and {len(images) - 3} more" if len(images) > 3 else "")
        loss = next(loss for loss, names in parts if names)
        step = self.epoch * self.n_iter + self.iter + 1
        where = f"step {step:,} (epoch {self.epoch + 1}, batch {self.iter + 1})"
        return f"the loss is {loss} at {where}, of the images {shown}", images
