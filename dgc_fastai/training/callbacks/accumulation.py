"""Gradient accumulation."""

from fastai.callback.core import CancelBatchException
from fastai.callback.training import GradientAccumulation


class WholeBatchAccumulation(GradientAccumulation):
    """fastai's GradientAccumulation, counting the images of a batch in all processes."""

    def after_loss(self):
        self.learn.loss_grad = self.learn.loss_grad * (self.dl.size(self.iter) / self.n_acc)

    def before_step(self):
        self.count += self.dl.size(self.iter)
        if self.count < self.n_acc:
            raise CancelBatchException  # no step, and the gradients stay
        self.count = 0
