"""The learning rate's schedules."""

import math

import pytest

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.training.schedules import schedules
from helpers import QUICKSTART
from helpers.runs import ONE_EPOCH


def rates(*overrides, steps=12, epochs=120):
    recipe = load_recipe(QUICKSTART, [f"train.epochs={epochs}", "train.lr=0.1", *overrides])
    return [schedules(recipe)["lr"](step / steps) for step in range(steps)]


def test_cosine_is_the_authors():
    expected = [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates("train.schedule=cosine") == pytest.approx(expected)


def test_multistep_is_the_authors():
    halves = [0.1] * 6 + [0.01] * 3 + [0.001] * 3
    assert rates("train.schedule=multistep") == pytest.approx(halves)
    for name in ("cifar10", "folder"):
        assert rates("train.schedule=multistep", f"data.name={name}", "data.path=.") == pytest.approx(halves)
    imagenet = "train.schedule=multistep", "data.name=imagenet", "data.path=."
    assert rates(*imagenet) == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3 + [0.0001] * 3)
    assert rates(*imagenet, epochs=60) == pytest.approx([0.1] * 6 + [0.01] * 6)
    # fastai adds the share up, and may come to a step with a little less than its due.
    curve = schedules(load_recipe(QUICKSTART, ["train.epochs=120", "train.lr=0.1", "train.schedule=multistep"]))["lr"]
    assert curve(0.5 - 1e-10) == pytest.approx(0.01) and curve(0.499) == 0.1


def test_flat_cosine_and_one_cycle_are_fastai_s():
    flat = rates("train.schedule=flat_cosine", steps=8)
    assert flat[:7] == pytest.approx([0.1] * 7) and flat[7] == pytest.approx(0.05, abs=1e-5)
    cycle = schedules(load_recipe(QUICKSTART, ["train.lr=0.1"]))
    assert [cycle["lr"](x) for x in (0, 0.25, 1)] == pytest.approx([0.1 / 25, 0.1, 1e-6])
    assert [cycle["mom"](x) for x in (0, 0.25, 1)] == pytest.approx([0.95, 0.85, 0.95])


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "flat_cosine"])
def test_warm_up_is_linear_and_leads_to_the_schedule(schedule):
    chosen = f"train.schedule={schedule}"
    warm, plain = rates(chosen, "train.warmup=30", steps=120), rates(chosen, steps=120)
    assert warm[:30] == pytest.approx([0.001 + 0.099 * step / 30 for step in range(30)])
    assert warm[30] == pytest.approx(0.1)
    if schedule == "cosine":  # over what is left
        assert warm[75] == pytest.approx(0.05)
    else:
        assert warm[30:] == pytest.approx(plain[30:])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_schedules_and_optimizers(optimizer, schedule):
    overrides = f"train.optimizer={optimizer}", f"train.schedule={schedule}", "train.lr=0.01", "train.weight_decay=0.02"
    recipe = load_recipe(QUICKSTART, [*ONE_EPOCH, "train.epochs=2", *overrides])
    learn = build_learner(recipe)
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    (group,) = learn.opt.opt.param_groups  # every parameter, norms and biases too, is decayed alike
    assert group["weight_decay"] == 0.02
    assert type(learn.opt.opt).__name__.lower() == optimizer
    rates = learn.recorder.lrs
    if schedule == "cosine":
        import math

        expected = [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
        assert rates == pytest.approx(expected)
        if optimizer == "sgd":
            assert group["nesterov"] and group["momentum"] == 0.9
    else:
        assert rates[0] < rates[2] > rates[-1] and max(rates) <= 0.01
