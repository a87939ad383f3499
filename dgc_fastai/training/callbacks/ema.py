"""Averaged weights."""

from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.torch_core import get_model
from timm.utils import ModelEmaV3

from .distributed import average_buffers
from .order import AVERAGE_WEIGHTS


class AverageWeights(Callback):
    """Keeps an exponential average of the weights over the steps; validates with it, and ends the fit with it.

    timm's ModelEmaV3, whose decay grows to `decay`, so that a short run's average does not keep its first steps. The
    number of inactive channels is an integer, and is copied.

    Args:
        decay: share of the average that a step keeps, such as 0.999.
    """

    order = AVERAGE_WEIGHTS
    state_key = "average_weights"

    def __init__(self, decay: float):
        self.decay = decay
        self.average: Any = None  # timm's ModelEmaV3 during a fit

    @property
    def averaged(self) -> torch.nn.Module:
        """The network with averaged weights during a fit; the learner's own otherwise."""
        return self.average.module if self.average else get_model(self.learn.model)

    def before_fit(self):
        self.average, self.updates = None, 0

    def before_train(self):
        if self.average is None:  # not in before_fit, which fastai also calls to validate only
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

    def average_over_processes(self) -> None:
        average_buffers(self.average.module)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.average.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.average.module.load_state_dict(state["weights"])
