"""What each of the processes of test_distributed does: trains a recipe, or validates, and keeps what came of it.

Usage: python processes.py FOLDER WHAT [key=value ...]
"""

import os
import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import nn

from dgc_fastai import DynamicGroupConv2d, load_recipe
from dgc_fastai.conv import dgc_layers
from dgc_fastai.data import build_dataloaders
from dgc_fastai.distributed import join, leave
from dgc_fastai.launch import is_first, rank
from dgc_fastai.learner import assemble, build_learner, evaluate, fit

QUICKSTART = Path(__file__).parents[1] / "recipes/quickstart.yaml"


class Watch(Callback):
    """Keeps how many channels are inactive in each step, and the order of the images."""

    order = 60

    def before_fit(self):
        self.inactive, self.order_of_images = [], []

    def after_batch(self):
        if self.training:
            self.inactive.append([int(layer.inactive_channels) for layer in dgc_layers(self.model)])

    def after_train(self):
        self.order_of_images.append(list(self.dl.indices))


def without_norms() -> nn.Module:
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


def main(folder: str, what: str, *overrides: str) -> None:
    recipe = load_recipe(QUICKSTART, overrides)
    if what == "plain":
        join(torch.device("cpu"))
        set_seed(0 if is_first() else 1)  # that processes agree is not to hang on their seeds
        torch.manual_seed(0)
        learn = assemble(recipe, build_dataloaders(recipe.data, torch.device("cpu")), without_norms())
    else:
        learn = build_learner(recipe)
    watch = Watch()
    result = {}
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(watch):
        if what != "evaluate":
            fit(learn, recipe)
            result = {"inactive": watch.inactive, "order": watch.order_of_images}
            result["history"] = [list(map(float, row)) for row in learn.recorder.values]
        result["scores"] = evaluate(learn)
    result["weights"] = learn.model.state_dict()
    result["first"] = is_first()
    torch.save(result, Path(folder) / f"{os.environ.get('WORLD_SIZE', 1)}-{rank()}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
