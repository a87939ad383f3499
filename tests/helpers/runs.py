"""Training runs that are started, stopped and compared."""

import csv
import io
import signal

from fastai.callback.core import Callback
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.training.callbacks.order import SAVE_STATE
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.training.run_folder import interrupted_run
from dgc_fastai.training.state_file import read_state
from dgc_fastai.utils.errors import Interrupted
from helpers import QUICKSTART
from helpers.golden import equal_states

SMALL = ["model.stages=[1,1,1]", "model.growth=[4,4,4]"]
TINY = [*SMALL, "data.batch_size=300", "train.epochs=3", "log.report=false"]
ONE_EPOCH = [*SMALL, "data.batch_size=400", "train.epochs=1"]


class StopAt(Callback):
    """What a signal during that batch does."""

    order = SAVE_STATE - 1

    def __init__(self, epoch, batch, training=True):
        self.place = epoch, batch, training

    def after_batch(self):
        if (self.epoch, self.iter, self.training) == self.place:
            self.save_state.stop = signal.SIGTERM


def start(overrides, resume=False, callback=None):
    """Train a recipe in this process: the run folder, or None if it was stopped, and the learner."""
    recipe = load_recipe(QUICKSTART, [*TINY, *overrides])
    run = TrainingRun(recipe)
    folder = interrupted_run(recipe)[0] if resume else None
    assert folder or not resume
    run.learner.add_cbs([callback] if callback else [])
    try:
        return run.fit(silent(), folder), run.learner
    except Interrupted:
        return None, run.learner


def trained(*overrides, callbacks=()):
    """The learner of a recipe after its fit, without a run folder."""
    learn = build_learner(load_recipe(QUICKSTART, [*ONE_EPOCH, *overrides]))
    learn.add_cbs(list(callbacks))
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    return learn


def silent():
    return Console(file=io.StringIO())


def history(folder):
    return [{**row, "seconds": None} for row in csv.DictReader(open(folder / "history.csv"))]


def same_run(first, second):
    assert history(first) == history(second)
    for name in ("last.safetensors", "best.safetensors"):
        assert equal_states(load_file(first / name), load_file(second / name)), name
    assert sorted(path.name for path in second.iterdir()) == sorted(path.name for path in first.iterdir())
    return True


def whole_files(folder):
    """Read every file of a run folder that is there for people or for a resumption."""
    for path in folder.glob("[!.]*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            read_state(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".csv":
            assert [row["epoch"] for row in history(folder)] == [str(n + 1) for n in range(len(history(folder)))]
