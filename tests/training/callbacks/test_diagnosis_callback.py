"""What a run finds out about itself, in whole runs."""

import json

import torch
from fastai.callback.core import Callback

from helpers.runs import SMALL, start

LAYER = "stages.1.layers.0.conv1"


class Break(Callback):
    """Breaks a layer of the network at the end of every epoch's training, or before all."""

    order = 49

    def __init__(self, event, function):
        self.event, self.function = event, function

    def before_fit(self):
        if self.event == "before_fit":
            self.function(self.model)

    def after_train(self):
        if self.event == "after_train":
            self.function(self.model)


def overflow(model):
    with torch.no_grad():
        model.get_submodule(LAYER).norm.running_var.fill_(-1)  # whose root is NaN


def close(model):
    with torch.no_grad():
        model.get_submodule(LAYER).gates.bias.fill_(-1e9)


def problems_of(tmp_path, *overrides, callback=None):
    folder, _ = start([f"output={tmp_path}", *SMALL, *overrides], callback=callback)
    return json.loads((folder / "summary.json").read_text())["problems"]


def test_the_layer_that_overflows_in_validation_is_named(tmp_path):
    first, *_ = problems_of(tmp_path, callback=Break("after_train", overflow))
    assert f"NaN or Inf in 3 of 3 epochs, from epoch 1 on; {LAYER}" in first


def test_a_layer_whose_gates_are_all_zero_is_named(tmp_path):
    first, *_ = problems_of(tmp_path, callback=Break("before_fit", close))
    assert first.startswith("All gates of 1 layer are zero") and LAYER in first


def test_a_network_that_did_not_learn_is_no_better_than_guessing(tmp_path):
    (line,) = problems_of(tmp_path, "train.lr=1e-9", "train.epochs=2")
    assert "no better than guessing" in line and "360 validation images" in line


def test_a_resumed_run_remembers_what_it_found(tmp_path):
    from helpers.runs import StopAt

    class StopAndBreak(StopAt):
        def after_train(self):
            if self.epoch == 0:
                overflow(self.model)

    output = [f"output={tmp_path}", *SMALL]
    assert start(output, callback=StopAndBreak(2, 1))[0] is None
    folder, _ = start(output, resume=True)
    (first, *_) = json.loads((folder / "summary.json").read_text())["problems"]
    assert LAYER in first and "from epoch 1 on" in first
