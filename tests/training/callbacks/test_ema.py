"""AverageWeights."""

import torch
from fastai.callback.core import Callback

from dgc_fastai import build_learner, load_recipe
from helpers import QUICKSTART
from helpers.golden import equal_states
from helpers.runs import ONE_EPOCH, trained


class Watch(Callback):
    """The weights after every step, and those that are validated."""

    order = 90

    def before_fit(self):
        self.steps, self.validated = [], []

    def after_step(self):
        self.steps.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    def before_validate(self):
        self.validated.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})


def test_averaged_weights_are_validated_and_kept():
    watch = Watch()
    learn = trained("train.ema=0.5", "train.epochs=2", callbacks=[watch])
    assert len(watch.steps) == 8
    average = {}
    for step, weights in enumerate(watch.steps):
        # timm's warm-up: the first steps count for more.
        decay = min(0.5, 1 - (1 + step) ** (-2 / 3)) if step else 0
        for name, tensor in weights.items():
            whole = not tensor.is_floating_point()
            average[name] = tensor if whole or not step else decay * average[name] + (1 - decay) * tensor
        if step in (3, 7):
            for name, tensor in watch.validated[step // 4].items():
                torch.testing.assert_close(tensor, average[name], rtol=1e-4, atol=1e-5)
    assert equal_states(learn.model.state_dict(), watch.validated[1])
    assert not equal_states(watch.steps[-1], watch.validated[1])
    assert learn.average_weights.average is None and learn.model.stages[0].layers[0].conv1.inactive_channels > 0


def test_a_cancelled_validation_leaves_the_learner_with_its_own_network():
    learn = build_learner(load_recipe(QUICKSTART, [*ONE_EPOCH, "train.ema=0.9"]))
    own = learn.model

    class Cancel(Callback):
        order = 90

        def after_batch(self):
            if not self.training:
                assert self.learn.model is not own
                from fastai.callback.core import CancelFitException

                raise CancelFitException

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Cancel())
    assert learn.model is own
