"""A training run and the folder it leaves behind."""

import csv
import io
import itertools
import json
import time
from pathlib import Path
from typing import Any

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from rich.console import Console

from .checkpoint import save_checkpoint
from .data import class_names
from .display import TrainingDisplay, draw_curves
from .errors import RecipeError
from .files import write_atomically
from .learner import fit
from .recipe import Recipe

__all__ = ["RunFolder", "new_run_folder", "train"]


def train(learn: Learner, recipe: Recipe, console: Console) -> Path:
    """Fit a Learner from `build_learner`, showing it on a console, into a new run folder, whose path is returned.

    Raises:
        RecipeError: the run folder cannot be made.
    """
    record = RunFolder(new_run_folder(recipe), recipe)
    display = TrainingDisplay(console, record.rows)
    with learn.removed_cbs(learn._grab_cbs(ProgressCallback)), learn.no_logging(), learn.added_cbs([record, display]):
        try:
            fit(learn, recipe)
        finally:
            display.close()
    return record.folder


def new_run_folder(recipe: Recipe) -> Path:
    """Make a folder of its own for a run, named for the recipe and the time, and put the recipe in it."""
    stem = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in itertools.count(1):
        folder = recipe.runs / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
            write_atomically(folder / "recipe.yaml", recipe.to_yaml())
            return folder
        except FileExistsError:  # of a run that started in the same second
            continue
        except OSError as error:
            raise RecipeError(f"output: cannot make the run folder {folder}: {error.strerror}") from None


class RunFolder(Callback):
    """Keeps a run's folder up to date: after every epoch its history, curves, last and best weights.

    The best weights are those of the highest top-1 among the epochs with the most channels inactive: a
    network whose gates are still open is another, dearer one.

    Args:
        folder: an existing folder.
        recipe: the run's recipe; weights carry it and the class names in their metadata.
    """

    order = 70  # after Recorder (50)

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe = folder, recipe
        self.rows: list[dict[str, Any]] = []
        self.best = (-1.0, -1.0)
        classes = json.dumps(class_names(recipe.data))
        self.metadata = {"recipe": recipe.to_yaml(), "classes": classes, "format": "pt"}

    def before_epoch(self):
        self.started = time.monotonic()

    def after_epoch(self):
        names = self.recorder.metric_names[:-1]  # without the time, which is text
        row = dict(zip(names, self.recorder.log))
        row["epoch"] = self.epoch + 1
        row["seconds"] = round(time.monotonic() - self.started, 3)
        self.rows.append(row)
        table = io.StringIO()
        writer = csv.DictWriter(table, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.folder / "history.csv", table.getvalue())
        write_atomically(self.folder / "curves.png", draw_curves(self.rows, self.recipe.name))
        save_checkpoint(self.model, self.folder / "last.safetensors", self.metadata)
        score = (row["inactive"], row["top_1"])
        if score >= self.best:
            self.best = score
            save_checkpoint(self.model, self.folder / "best.safetensors", self.metadata)
