"""A training run and the folder it leaves behind."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import get_model
from rich.console import Console

from . import launch
from .budget import Budget
from .checkpoint import save_checkpoint
from .data import class_names
from .display import TrainingDisplay, draw_curves
from .distributed import from_first, largest, lost_processes_named
from .errors import Interrupted, LostProcess, RecipeError, TrainingError, WriteError
from .files import only_one, remove_partial, write_atomically, write_table
from .learner import fit
from .loggers import logging_callbacks
from .recipe import Recipe, differences, load_recipe
from .resume import Snapshots, read_state

__all__ = ["RunFolder", "interrupted_run", "new_run_folder", "run_to_go_on_with", "train"]

LAUNCH = "launch.txt"  # in the folder of a run that torchrun has started: which launch took it last
NEW, INTERRUPTED, COMPLETE = range(3)


def train(learn: Learner, recipe: Recipe, cost: Budget, console: Console, folder: Optional[Path] = None) -> Path:
    """Fit a Learner from `build_learner`, showing it on a console, into a run folder, whose path is returned.

    Of several processes, the first alone shows and writes.

    Args:
        cost: of the learner's network, for the summary.
        folder: of a run to go on with, from `run_to_go_on_with`; None for a new one.

    Raises:
        RecipeError: the run folder cannot be made, or a logger is not installed.
        CheckpointError: the state of the interrupted run cannot be read.
        TrainingError: the loss is not finite any more.
        Interrupted: SIGINT or SIGTERM came, and the run was saved.
        LostProcess: another process that trains with this one, or one that reads its images, has died.
        WriteError: a file of the run, or of a logger, cannot be written. What was written before is whole, and the
            run can go on from there.
    """
    stage = largest(_stage(folder, recipe) if folder and launch.is_first() else NEW)
    if stage == COMPLETE:  # by the time that another process died
        return folder
    state = read_state(folder / "state.pt") if stage == INTERRUPTED else None
    folder = _agreed(folder or (new_run_folder(recipe) if launch.is_first() else None))
    record = RunFolder(folder, recipe, cost)
    if state:
        record.rows += state["rows"]
    snapshots = Snapshots(folder / "state.pt", recipe.train.seed, record, state)
    callbacks, display = [snapshots], TrainingDisplay(console, record.rows, recipe.log.print_every)
    resume = f"python app.py {folder / 'recipe.yaml'} --resume"
    with _alone(folder) if launch.is_first() else nullcontext():
        if launch.is_first():
            remove_partial(folder)
            if launch.launch_name():  # of a folder that was begun by an earlier launch, too
                write_atomically(folder / LAUNCH, launch.launch_name() + "\n")
            callbacks += [record, display, *logging_callbacks(recipe, folder)]
        with _callbacks(learn, callbacks):
            try:
                with snapshots.on_signals(), lost_processes_named():
                    fit(learn, recipe, snapshots.first_epoch)
            except TrainingError as error:
                raise TrainingError(f"{error}; {_left_behind(folder, record, learn.non_finite_loss.images)}") from None
            except LostProcess as error:
                next_step = "all are started again" if launch.will_restart() else f"to go on: {resume}"
                raise LostProcess(f"{error}; the run is saved up to its last epoch; {next_step}") from None
            except WriteError as error:
                raise WriteError(f"{error}, then go on: {resume}") from None
            except OSError as error:  # from where loggers write, and from where the terminal's text goes
                raise WriteError(f"{error}; mend that, then go on: {resume}") from None
            finally:
                display.close()
    if snapshots.stopped:
        raise Interrupted(f"interrupted {snapshots.stopped}, and saved; to go on: {resume}", snapshots.stop)
    return folder


def run_to_go_on_with(recipe: Recipe, resume: bool) -> tuple[Optional[Path], str]:
    """The folder that all processes are to go on with, if any, and a line that says so.

    It is that of the newest interrupted run of the recipe, if `resume` asks for it. After torchrun has started all
    processes again, because one had died, it is the one that they had begun, wherever that run has come to.
    """
    folder, found = None, ""
    restarted = largest(launch.restarts())  # each machine's launcher counts for itself
    if launch.is_first():
        if restarted and launch.launch_name():
            folder = _begun_by_this_launch(recipe)
            found = f"A process has died, and all were started again: going on with {folder}." if folder else ""
        elif resume or restarted:
            folder, found = interrupted_run(recipe)
    return _agreed(folder), found


def _begun_by_this_launch(recipe: Recipe) -> Optional[Path]:
    """The folder that this launch has last taken for a recipe; an earlier one may have had the same name."""
    for path in sorted(recipe.runs.glob(f"*/{LAUNCH}"), key=lambda path: path.stat().st_mtime, reverse=True):
        if path.read_text().strip() == launch.launch_name():
            same = not differences(recipe, load_recipe(path.parent / "recipe.yaml"), ignore=("output", "log"))
            return path.parent if same else None
    return None


def _agreed(folder: Optional[Path]) -> Optional[Path]:
    text = from_first(str(folder).encode() if folder else None)
    return Path(text.decode()) if text else None


def _stage(folder: Path, recipe: Recipe) -> int:
    if (folder / "state.pt").exists():
        return INTERRUPTED
    summary = folder / "summary.json"
    done = json.loads(summary.read_text())["epochs"] if summary.exists() else 0
    return COMPLETE if done == recipe.train.epochs else NEW


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        with only_one(folder / "recipe.yaml"):
            yield
    except BlockingIOError:
        raise RecipeError(f"output: {folder} is going on in another process") from None


def _left_behind(folder: Path, record: "RunFolder", images: list[str]) -> str:
    """What there is after a loss that was no number: where the names of the images are, and the last good weights."""
    found = []
    if images:
        names = folder / "nonfinite.txt"
        if launch.is_first():
            write_atomically(names, "\n".join(images) + "\n")
        found.append(f"all names are in {names}")
    if record.rows:
        found.append(f"the last good weights are {folder / 'last.safetensors'}, of epoch {record.rows[-1]['epoch']}")
    else:
        found.append("no epoch had ended before")
    return "; ".join(found)


@contextmanager
def _callbacks(learn: Learner, callbacks: list[Callback]) -> Iterator[None]:
    with learn.removed_cbs(learn._grab_cbs(ProgressCallback)), learn.no_logging(), learn.added_cbs(callbacks):
        yield


def new_run_folder(recipe: Recipe) -> Path:
    """Make a folder of its own for a run, named for the recipe and the time, and put the recipe in it."""
    stem = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in itertools.count(1):
        folder = recipe.runs / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # of a run that started in the same second
            continue
        except OSError as error:
            raise RecipeError(f"output: cannot make the run folder {folder}: {error.strerror}") from None
        try:
            write_atomically(folder / "recipe.yaml", recipe.to_yaml())
        except WriteError:
            folder.rmdir()
            raise
        return folder


def interrupted_run(recipe: Recipe) -> tuple[Optional[Path], str]:
    """The newest run of a recipe below `output` that was interrupted, and a line to tell what was found.

    Another `output` or `log` makes no other run of a recipe. A run that is going on is none that was interrupted.
    """

    def time_of(path: Path) -> float:
        return path.stat().st_mtime if path.exists() else 0.0  # of a run that has just ended

    states = sorted(recipe.runs.glob("*/state.pt"), key=time_of, reverse=True)
    passed = ""
    for folder in (path.parent for path in states):
        try:
            different = differences(recipe, load_recipe(folder / "recipe.yaml"), ignore=("output", "log"))
            with only_one(folder / "recipe.yaml"):
                if not different:
                    return folder, f"Going on with {folder}."
        except RecipeError:  # not a run of ours, or one of another version
            continue
        except BlockingIOError:
            passed = passed or f"; {folder} is going on in another process"
        else:
            if folder.name.startswith(recipe.name):
                passed = passed or f"; {folder} was interrupted, too, but differs in {', '.join(different[:3])}"
    return None, f"No interrupted run of this recipe below {recipe.runs}: starting one{passed}."


class RunFolder(Callback):
    """Keeps a run's folder up to date: after every epoch its history, summary, last and best weights; its curves
    at times, and at the end.

    The best weights are those of the highest top-1 among the epochs with the most channels inactive: a
    network whose gates are still open is another, dearer one.

    Args:
        folder: an existing folder.
        recipe: the run's recipe; weights carry it and the class names in their metadata.
        cost: of the network.
    """

    order = 70  # after Recorder (50)

    def __init__(self, folder: Path, recipe: Recipe, cost: Budget):
        self.folder, self.recipe = folder, recipe
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.drawn, self.drawing = self.started, 1.0  # a first guess
        classes = json.dumps(class_names(recipe.data))
        self.metadata = {"recipe": recipe.to_yaml(), "classes": classes, "format": "pt"}
        self.summary = {
            "name": recipe.name,
            "macs": cost.macs,
            "macs_dense": cost.macs_dense,
            "operations": cost.operations,
            "parameters": cost.parameters,
        }

    def before_epoch(self):
        self.started = time.monotonic()

    def after_epoch(self):
        names = self.recorder.metric_names[:-1]  # without the time, which is text
        row = dict(zip(names, self.recorder.log))
        row["epoch"] = self.epoch + 1
        row["seconds"] = round(time.monotonic() - self.started, 3)
        self.rows.append(row)
        write_table(self.folder / "history.csv", self.rows)
        if time.monotonic() - self.drawn > 20 * self.drawing:  # short epochs are not to wait for pictures
            self._draw()
        average = getattr(self, "average_weights", None)
        network = average.averaged if average else get_model(self.model)
        # The later one of equals, as the authors do.
        best = max(self.rows, key=lambda row: (row["inactive"], row["top_1"], row["epoch"]))
        names = ["last.safetensors"]
        if best is row:
            names.append("best.safetensors")
        if self.recipe.log.keep_every and row["epoch"] % self.recipe.log.keep_every == 0:
            names.append(f"epoch_{row['epoch']:04d}.safetensors")
        for name in names:
            save_checkpoint(network, self.folder / name, self.metadata)
        self.summary.update(
            epochs=row["epoch"],
            seconds=round(sum(row["seconds"] for row in self.rows), 3),
            best=best,
            last=row,
        )
        write_atomically(self.folder / "summary.json", json.dumps(self.summary, indent=2) + "\n")

    def after_fit(self):
        if self.rows:
            self._draw()

    def _draw(self) -> None:
        began = time.monotonic()
        write_atomically(self.folder / "curves.png", draw_curves(self.rows, self.recipe.name))
        self.drawn, self.drawing = time.monotonic(), time.monotonic() - began
