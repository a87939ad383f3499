"""A training run and the folder it leaves behind."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Optional

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from rich.console import Console

from ..models.cost import Budget
from ..recipe.schema import Recipe
from ..utils import launch
from ..utils.errors import Interrupted, LostProcess, TrainingError, WriteError
from ..utils.files import remove_partial, write_atomically
from .callbacks.progress import TrainingDisplay
from .callbacks.run_files import RunFolder
from .distributed import largest, lost_processes_named
from .learner import fit
from .loggers import logging_callbacks
from .resume import Snapshots, read_state
from .run_folder import COMPLETE, INTERRUPTED, LAUNCH, NEW, _agreed, _alone, _stage, new_run_folder

__all__ = ["train"]


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
    stage = largest(_stage(folder, recipe) if folder and launch.is_main_process() else NEW)
    if stage == COMPLETE:  # by the time that another process died
        return folder
    state = read_state(folder / "state.pt") if stage == INTERRUPTED else None
    folder = _agreed(folder or (new_run_folder(recipe) if launch.is_main_process() else None))
    record = RunFolder(folder, recipe, cost)
    if state:
        record.rows += state["rows"]
    snapshots = Snapshots(folder / "state.pt", recipe.train.seed, record, state)
    callbacks, display = [snapshots], TrainingDisplay(console, record.rows, recipe.log.print_every)
    resume = f"python app.py {folder / 'recipe.yaml'} --resume"
    with _alone(folder) if launch.is_main_process() else nullcontext():
        if launch.is_main_process():
            remove_partial(folder)
            if launch.launch_id():  # of a folder that was begun by an earlier launch, too
                write_atomically(folder / LAUNCH, launch.launch_id() + "\n")
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


def _left_behind(folder: Path, record: "RunFolder", images: list[str]) -> str:
    """What there is after a loss that was no number: where the names of the images are, and the last good weights."""
    found = []
    if images:
        names = folder / "nonfinite.txt"
        if launch.is_main_process():
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
