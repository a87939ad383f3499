"""What each of the processes of test_distributed does: trains a recipe, or validates, and keeps what came of it.

Usage: python processes.py FOLDER SCENARIOS, as `main` tells.
"""

import io
import json
import math
import signal
import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from rich.console import Console
from torch import nn

from dgc_fastai import DynamicGroupConv2d, build_learner, load_recipe
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.training.callbacks.order import ANNEAL_GATES, SAVE_STATE
from dgc_fastai.training.collectives import destroy_process_group, init_process_group
from dgc_fastai.training.learner import assemble, evaluate
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.training.run_folder import find_resumable_run
from dgc_fastai.utils.errors import Interrupted, TrainingError
from dgc_fastai.utils.launch import rank, world_size
from helpers import QUICKSTART


class Watch(Callback):
    """Keeps how many channels are inactive in each step."""

    def before_fit(self):
        if not hasattr(self, "inactive"):
            self.inactive = []

    def after_batch(self):
        if self.training:
            self.inactive.append([int(layer.inactive_channels) for layer in dgc_layers(self.model)])


def without_norm_layers() -> nn.Module:
    """Gated layers, but nothing that depends on how many images there are in a part of a batch."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        DynamicGroupConv2d(16, 32, 3, padding=1, preact=False, bias=True),
        nn.ReLU(),
        DynamicGroupConv2d(32, 32, 1, preact=False, bias=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class AskedToStop(Callback):
    """What a signal to the last process alone does, during the second batch of the second epoch."""

    order = SAVE_STATE - 1

    def after_batch(self):
        if rank() == world_size() - 1 and self.training and (self.epoch, self.iter) == (1, 1):
            self.save_state.stop = signal.SIGTERM


class NonFinite(Callback):
    """Makes the last process's loss of the second batch NaN, and the statistics of its normalization layers."""

    order = ANNEAL_GATES - 1

    def after_loss(self):
        if rank() == world_size() - 1 and self.training and (self.epoch, self.iter) == (0, 1):
            self.learn.loss_grad, self.learn.loss = self.learn.loss_grad * math.nan, self.learn.loss * math.nan
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.data.fill_(math.nan)


def plain(recipe, teacher=None):
    """Trains a network without normalization layers; processes begin with other random numbers each."""
    init_process_group(torch.device("cpu"))
    set_seed(rank())
    dls = build_dataloaders(recipe.data, torch.device("cpu"))
    if rank() == 0:
        set_seed(0)
        dls = build_dataloaders(recipe.data, torch.device("cpu"))
    torch.manual_seed(0)
    return train_only(assemble(recipe, dls, without_norm_layers(), teacher))


def taught(recipe):
    torch.manual_seed(1)
    return plain(recipe, without_norm_layers())


def train_only(learn, *callbacks):
    watch = Watch()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([watch, *callbacks]):
        learn.fit_recipe()
        rows = [list(map(float, row)) for row in learn.recorder.values]
        scores = evaluate(learn)
    return {"inactive": watch.inactive, "history": rows, "scores": scores, "weights": learn.model.state_dict()}


def non_finite(recipe):
    try:
        return train_only(build_learner(recipe), NonFinite())
    except TrainingError as error:
        return {"error": str(error)}


def validate(recipe):
    learn = build_learner(recipe)
    with learn.no_bar(), learn.no_logging():
        return {"scores": evaluate(learn)}


def whole_run(recipe, *callbacks, resume=False):
    """As app.py does it."""
    run = TrainingRun(recipe)
    run.learner.add_cbs(callbacks)
    folder, _ = find_resumable_run(recipe, resume)
    try:
        folder = run.fit(Console(file=io.StringIO()), folder)
    except Interrupted as stop:
        return {"stopped": stop.args[0]}
    return {"folder": str(folder), "weights": run.learner.model.state_dict()}


WHAT = {
    "plain": plain,
    "taught": taught,
    "train": lambda recipe: train_only(build_learner(recipe)),
    "non_finite": non_finite,
    "validate": validate,
    "run": whole_run,
    "stop": lambda recipe: whole_run(recipe, AskedToStop()),
    "resume": lambda recipe: whole_run(recipe, resume=True),
}


def main(folder: str, scenarios: str) -> None:
    """Go through scenarios, as JSON a list of [name, what, overrides]; what comes of each is in a file of its name."""
    for name, what, overrides in json.loads(scenarios):
        result = WHAT[what](load_recipe(QUICKSTART, overrides))
        torch.save(result, Path(folder) / f"{name}-{world_size()}-{rank()}.pt")
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
