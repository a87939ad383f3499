"""A Learner from a recipe."""

import unittest.mock
from functools import partialmethod

import pytest
import torch
from fastai.callback.core import Callback

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.training.callbacks.ema import AverageWeights
from dgc_fastai.training.callbacks.mixing import DeviceCutMix, DeviceMixUp, MixUpOrCutMix
from dgc_fastai.training.learner import evaluate
from dgc_fastai.utils.errors import RecipeError
from helpers import QUICKSTART
from helpers.golden import equal_states
from helpers.runs import ONE_EPOCH, trained


def test_in_a_notebook_the_same_recipe_gives_a_fastai_learner():
    import matplotlib

    matplotlib.use("Agg")
    recipe = load_recipe(QUICKSTART, ONE_EPOCH)
    learn = build_learner(recipe)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
        learn.show_results(max_n=4)
    assert learn.recorder.metric_names[1:-1] == [
        "train_loss", "valid_loss", "top_1", "top_5", "inactive", "gate_penalty", "lr",
    ]  # fmt: skip
    assert "progress" in [cb.name for cb in learn.cbs]
    result = evaluate(learn)
    assert 0 <= result["top_1"] <= result["top_5"] <= 1


def test_the_same_seed_gives_the_same_weights():
    states = []
    for seed in (1, 1, 2):
        recipe = load_recipe(QUICKSTART, [*ONE_EPOCH, f"train.seed={seed}"])
        learn = build_learner(recipe)
        with learn.no_bar(), learn.no_logging():
            learn.fit_recipe()
        states.append({name: tensor.clone() for name, tensor in learn.model.state_dict().items()})
    assert equal_states(states[0], states[1]) and not equal_states(states[0], states[2])


def test_gradients_are_clipped():
    norms = []

    class Norms(Callback):
        order = 15

        def before_step(self):
            norms.append(float(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm()))

    trained("train.clip=0.01", callbacks=[Norms()])
    assert norms == pytest.approx([0.01] * 4, rel=1e-2)


def test_label_smoothing_is_pytorch_s():
    learn = trained("train.label_smoothing=0.1")
    x, y = torch.randn(5, 10), torch.arange(5)
    expected = torch.nn.functional.cross_entropy(x, y, label_smoothing=0.1)
    torch.testing.assert_close(learn.loss_func(x, y), expected)


def test_nothing_is_added_that_is_not_asked_for():
    learn = build_learner(load_recipe(QUICKSTART, ONE_EPOCH))
    kinds = {type(callback) for callback in learn.cbs}
    assert not kinds & {DeviceMixUp, DeviceCutMix, MixUpOrCutMix, AverageWeights}
    assert not hasattr(learn, "whole_batch_accumulation") and not hasattr(learn, "gradient_clip")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.growth=[4096,4096,4096]", "model.stages=[9,9,9]"], "2,000,000,000 is the most that is tried"),
        (["model.growth=[4,4,4,4,4]", "model.stages=[1,1,1,1,1]"], "cannot take images of"),
    ],
    ids=["too many parameters", "too many stages"],
)
def test_a_network_out_of_reach_is_refused_before_memory_is_spent(overrides, message):
    with pytest.raises(RecipeError, match=message):
        build_learner(load_recipe(QUICKSTART, overrides))


def test_channels_last_and_compile_train_the_same_network():
    import torch._dynamo

    torch._dynamo.reset()
    # Adam makes much of a gradient's rounding error; gates that start at one are a rounding error apart.
    sgd = "train.optimizer=sgd", "train.lr=0.01", "model.zero_init_gates=false"
    plain = trained(*sgd)
    last = trained("train.channels_last=true", *sgd)
    weights = [parameter for parameter in last.model.parameters() if parameter.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with unittest.mock.patch("torch.nn.Module.compile", partialmethod(torch.nn.Module.compile, backend="eager")):
        compiled = trained("train.compile=true", *sgd)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for learn in (last, compiled):
        assert learn.model.state_dict().keys() == plain.model.state_dict().keys()
        for name, value in plain.model.state_dict().items():
            torch.testing.assert_close(learn.model.state_dict()[name], value, rtol=1e-2, atol=1e-3)
