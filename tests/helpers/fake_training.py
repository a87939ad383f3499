"""Training runs on the fake GPU, with counts of one step of each kind."""

from types import SimpleNamespace

from fastai.callback.core import Callback

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.ops import use_backend
from helpers import QUICKSTART
from helpers.counting import Counts

__all__ = ["counted_fit"]


class CountSteps(Callback):
    """Counts of the second batch of training, from the end of the first to its own, and of the first of validation."""

    order = 1000

    def __init__(self, gpu):
        self.gpu, self.train, self.valid, self.rest = gpu, Counts(), Counts(), gpu.counts

    def before_step(self):
        self.gradients = {weight.grad.dtype for weight in self.model.parameters()}

    def after_batch(self):
        self.gpu.counts = self.train if self.training and self.iter == 0 else self.rest

    def before_validate(self):
        self.gpu.counts = self.valid


def counted_fit(gpu, *overrides: str, watch=None, backend=None):
    """One epoch of a recipe on the fake GPU: its learner, and the counts of a step of training and of validation.

    By default two batches of digits to train with, and one for validation.

    Args:
        backend: of the layers, once the network exists; see `use_backend`.
        watch: called with the network before it is trained; what it returns is `watched`.
    """
    learn = build_learner(load_recipe(QUICKSTART, ["train.epochs=1", "data.batch_size=719", *overrides]))
    steps = CountSteps(gpu)
    learn.add_cb(steps)
    watched = watch(learn.model) if watch else None
    with learn.no_bar(), learn.no_logging(), gpu.counting(), use_backend(backend):
        steps.rest = gpu.counts
        learn.fit_recipe()
    return SimpleNamespace(
        learn=learn, train=steps.train, valid=steps.valid, gradients=steps.gradients, watched=watched
    )
