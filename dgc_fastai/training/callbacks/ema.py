"""Averaged weights."""

import torch
from fastai.callback.core import Callback
from fastai.torch_core import get_model
from timm.utils import ModelEmaV3


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
