"""A training run: from a recipe to a folder with its weights.

A recipe goes through these files, in this order, and returns to none of them:

1. `recipe/loading.py`: YAML -> Recipe
2. `training/run.py`: Recipe -> TrainingRun, which resolves the device, the classes and the cost once
3. `models/factory.py`: model section -> network
4. `data/loaders.py`: data section -> DataLoaders
5. `training/learner.py`: train section -> Learner, and its fit
6. `training/callbacks/run_files.py`: an epoch -> its row and files
7. `models/checkpoints.py`: network -> weights
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Optional

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import set_seed
from rich.console import Console

from ..data.loaders import build_dataloaders, class_names
from ..models.checkpoints import load_checkpoint
from ..models.factory import create_model, network_cost, prepare
from ..ops.device import use_device
from ..recipe.schema import Recipe
from ..utils import launch
from ..utils.errors import Interrupted, LostProcess, RecipeError, TrainingError, WriteError
from ..utils.files import remove_partial, write_atomically
from ..utils.invocation import program
from .callbacks.progress import TrainingDisplay
from .callbacks.run_files import RunFolder
from .distributed import join, largest, lost_processes_named
from .learner import RecipeLearner, assemble, evaluate
from .loggers import logging_callbacks
from .resume import Snapshots, read_state
from .run_folder import COMPLETE, INTERRUPTED, LAUNCH, NEW, _agreed, _alone, _stage, new_run_folder

__all__ = ["TrainingRun", "build_learner"]


class TrainingRun:
    """One run of a recipe: what it needs is resolved once, then `fit` or `evaluate` use it.

    If several processes were started, this joins them (see `distributed`).

    Args:
        recipe: from `load_recipe`.

    Attributes:
        device: where the network and its batches are.
        classes: class names in the order of the network's outputs.
        input_size: channels, height and width of an image.
        cost: of the network, before any training.

    Raises:
        RecipeError: the device cannot be used, the data's class names cannot be read, or the network's keywords do
            not go together or do not fit the size of the images.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.device = use_device(recipe.device)
        join(self.device)
        if self.device.type != "cuda" and recipe.train.precision == "fp16":
            raise RecipeError("train.precision: fp16 needs a CUDA device; use bf16 or float32 here")
        self.classes = class_names(recipe.data)
        self.input_size = recipe.data.input_size
        self.cost = network_cost(recipe.model, len(self.classes), self.input_size)

    @cached_property
    def learner(self) -> RecipeLearner:
        """The fastai Learner, built when first used: Python's, NumPy's and torch's random numbers are seeded then.

        Raises:
            RecipeError: the data cannot be read, or timm's optimizer cannot be used here.
        """
        recipe = self.recipe
        set_seed(recipe.train.seed)
        network = prepare(create_model(recipe.model, len(self.classes), self.input_size), recipe.train, self.device)
        return assemble(recipe, build_dataloaders(recipe.data, self.device, self.classes), network)

    def fit(self, console: Console, folder: Optional[Path] = None) -> Path:
        """Train into a run folder and return its path. Of several processes, the first one shows and writes.

        Args:
            console: where to show the progress.
            folder: of a run to resume, from `run_to_go_on_with`; None for a new one.

        Raises:
            RecipeError: the run folder cannot be made, or a logger is not installed.
            CheckpointError: the state of the interrupted run cannot be read.
            TrainingError: the loss or the weights are NaN or Inf.
            Interrupted: SIGINT or SIGTERM came, and the run was saved.
            LostProcess: another process of this run, or one that reads its images, has died.
            WriteError: a file of the run, or of a logger, cannot be written. What was written before is intact, and
                the run can be resumed.
        """
        recipe, learn = self.recipe, self.learner
        stage = largest(_stage(folder, recipe) if folder and launch.is_main_process() else NEW)
        if stage == COMPLETE:  # by the time that another process died
            return folder
        state = read_state(folder / "state.pt") if stage == INTERRUPTED else None
        folder = _agreed(folder or (new_run_folder(recipe) if launch.is_main_process() else None))
        record = RunFolder(folder, recipe, self.classes, self.cost)
        if state:
            record.rows += state["rows"]
        snapshots = Snapshots(folder / "state.pt", recipe.train.seed, record, state)
        callbacks, display = [snapshots], TrainingDisplay(console, record.rows, recipe.log.print_every)
        resume = f"{program()} {folder / 'recipe.yaml'} --resume"
        with _alone(folder) if launch.is_main_process() else nullcontext():
            if launch.is_main_process():
                remove_partial(folder)
                if launch.launch_id():  # of a folder that was begun by an earlier launch, too
                    write_atomically(folder / LAUNCH, launch.launch_id() + "\n")
                callbacks += [record, display, *logging_callbacks(recipe, folder)]
            with _callbacks(learn, callbacks):
                try:
                    with snapshots.on_signals(), lost_processes_named():
                        learn.fit_recipe(snapshots.first_epoch)
                except TrainingError as error:
                    raise TrainingError(
                        f"{error}; {_left_behind(folder, record, learn.non_finite_loss.images)}"
                    ) from None
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

    def load(self, weights: Path) -> None:
        """Load the network's weights from a file, as `load_checkpoint`.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another network.
        """
        load_checkpoint(self.learner.model, weights)

    def evaluate(self, console: Console) -> dict[str, float]:
        """Loss, top-1 and top-5 over the validation images, the accuracies in [0, 1]; see `learner.evaluate`.

        Raises:
            LostProcess: another process of this run, or one that reads images, has died.
        """
        learn = self.learner
        display = [TrainingDisplay(console)] if launch.is_main_process() else []
        with _callbacks(learn, display), lost_processes_named():
            return evaluate(learn)


def build_learner(recipe: Recipe) -> RecipeLearner:
    """A fastai Learner with the recipe's data, network, optimizer, gates and precision, ready to fit.

    Seeds Python's, NumPy's and torch's random numbers with `train.seed` first. A `TrainingRun` keeps a run folder, too.

    Args:
        recipe: from `load_recipe`.

    Raises:
        RecipeError: the data, the network, the optimizer or the device cannot be used.
    """
    return TrainingRun(recipe).learner


def _left_behind(folder: Path, record: RunFolder, images: list[str]) -> str:
    """What there is after a loss of NaN or Inf: the file with the names of the images, and the last good weights."""
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
