"""The files of a run."""

from types import SimpleNamespace

import torch
from safetensors import safe_open

from dgc_fastai import load_recipe
from dgc_fastai.models.factory import network_cost
from dgc_fastai.training.callbacks.run_recorder import RunRecorder
from dgc_fastai.training.diagnosis import Findings
from helpers import QUICKSTART


def test_best_is_the_best_of_the_most_closed(tmp_path):
    recipe = load_recipe(QUICKSTART)
    record = RunRecorder(tmp_path, recipe, list("0123456789"), network_cost(recipe.model, 10, (1, 8, 8)), Findings())
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
