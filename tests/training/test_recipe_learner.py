"""A Learner from a recipe, without the command line."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.models.factory import network_cost
from dgc_fastai.training.callbacks.run_recorder import RunRecorder
from dgc_fastai.training.learner import evaluate
from helpers import QUICKSTART
from helpers.command_line import TINY
from helpers.golden import equal_states


def test_best_is_the_best_of_the_most_closed(tmp_path):
    recipe = load_recipe(QUICKSTART)
    record = RunRecorder(tmp_path, recipe, list("0123456789"), network_cost(recipe.model, 10, (1, 8, 8)))
    names = ["epoch", "train_loss", "valid_loss", "top_1", "top_5", "inactive", "gate_penalty", "lr", "time"]
    epochs = [(0.9, 0.0), (0.8, 0.4), (0.7, 0.75), (0.75, 0.75), (0.75, 0.75), (0.6, 0.75)]
    best = []
    for epoch, (top_1, inactive) in enumerate(epochs):
        log = [epoch, 1.0, 1.0, top_1, 1.0, inactive, 1.0, 0.1, "00:01"]
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(epoch)
        record.learn = SimpleNamespace(
            epoch=epoch, model=model, recorder=SimpleNamespace(metric_names=names, log=log)
        )  # fmt: skip
        record.before_epoch()
        record.after_epoch()
        with safe_open(tmp_path / "best.safetensors", "pt") as file:
            best.append(int(file.get_tensor("weight")))
        with safe_open(tmp_path / "last.safetensors", "pt") as file:
            assert file.get_tensor("weight") == epoch
    assert best == [0, 1, 2, 3, 4, 4]  # the later one of equals, as the authors do


def test_in_a_notebook_the_same_recipe_gives_a_fastai_learner():
    import matplotlib

    matplotlib.use("Agg")
    recipe = load_recipe(QUICKSTART, ["train.epochs=1", *TINY])
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
        recipe = load_recipe(QUICKSTART, ["train.epochs=1", "data.batch_size=400", f"train.seed={seed}", *TINY])
        learn = build_learner(recipe)
        with learn.no_bar(), learn.no_logging():
            learn.fit_recipe()
        states.append({name: tensor.clone() for name, tensor in learn.model.state_dict().items()})
    assert equal_states(states[0], states[1]) and not equal_states(states[0], states[2])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_schedules_and_optimisers(optimizer, schedule):
    overrides = f"train.optimizer={optimizer}", f"train.schedule={schedule}", "train.lr=0.01", "train.weight_decay=0.02"
    recipe = load_recipe(QUICKSTART, ["train.epochs=2", "data.batch_size=400", *overrides, *TINY])
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
