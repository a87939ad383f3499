"""Gradient accumulation."""

from typing import Any

from fastai.callback.core import CancelBatchException
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import get_model


class WholeBatchAccumulation(GradientAccumulation):
    """fastai's GradientAccumulation, which counts the images of a batch in all processes."""

    state_key = "gradient_accumulation"
    count: int

    def before_train(self):
        self.network = get_model(self.model)  # in validation, the learner may hold averaged weights

    def after_loss(self):
        self.learn.loss_grad = self.learn.loss_grad * (self.dl.size(self.iter) / self.n_acc)

    def before_step(self):
        self.count += self.dl.size(self.iter)
        if self.count < self.n_acc:
            raise CancelBatchException  # no step, and the gradients are kept
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "gradients": [parameter.grad for parameter in self.network.parameters()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for parameter, gradient in zip(self.network.parameters(), state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
