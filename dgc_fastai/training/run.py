"""A training run: from a recipe to a folder with its weights.

A recipe goes through these files, in this order, and returns to none of them. Helpers of a single step are not listed.

1. `recipe/loading.py`: YAML -> Recipe
2. `training/run.py`: Recipe -> TrainingRun, which resolves the device, the classes and the cost once
3. `data/classes.py`: data section -> class names
4. `models/factory.py`: model section -> network, and its cost
5. `data/loaders.py`: data section -> DataLoaders
6. `training/learner.py`: train section -> Learner, and its fit
7. `training/callbacks/run_recorder.py`: an epoch -> its row and files
8. `models/checkpoints.py`: network -> weights
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import set_seed
from rich.console import Console

from ..data.classes import class_names
from ..data.loaders import build_dataloaders
from ..layers.gate_schedule import dgc_layers
from ..models.checkpoints import load_checkpoint, saved_recipe
from ..models.cost import Budget
from ..models.factory import checked_cost, convert_model, create_unconverted, network_cost, prepare
from ..models.weights import OtherClasses, Weights, load_weights, read_weights
from ..ops.device import resolve, use_device
from ..recipe.schema import Recipe
from ..utils import launch
from ..utils.errors import CheckpointError, Interrupted, RecipeError, TrainingError, WriteError
from ..utils.files import write_atomically
from ..utils.invocation import program
from .callbacks.diagnosis import Diagnosis
from .callbacks.progress import TrainingDisplay
from .callbacks.run_recorder import RunRecorder
from .callbacks.save_state import SaveState
from .collectives import init_process_group, lost_processes_named
from .gate_choice import GateChoice, choose_gate_factors
from .learner import RecipeLearner, assemble, evaluate
from .loggers import logging_callbacks
from .run_folder import STATE, Stage, lock_run, prepare_run_folder
from .state_file import read_state
from .teacher import load_teacher

__all__ = ["TrainingRun", "build_learner"]

_logger = logging.getLogger(__name__)

NO_WEIGHTS = "it has no weights; set model.weights, or use `compress`, which trains it first"


class TrainingRun:
    """One run of a recipe: what it needs is resolved once, then `fit` or `evaluate` use it.

    If several processes were started, it joins them (see `collectives`).

    Args:
        recipe: from `load_recipe`.
        gets_weights: the network's weights will be loaded, from a file or the state of a run: not `model.weights`.
        network: to train instead of that of `model.arch`, with the weights that it has; `model.convert` applies to it.
        notify: called with what is going on while gate factors are chosen.

    Attributes:
        recipe: with the precision and the memory format that it has on the device, and, once there is a learner, the
            gate factors that were chosen.
        device: where the network and its batches are.
        classes: class names in the order of the network's outputs.
        input_size: channels, height and width of an image.
        cost: of the network, before any training. Until gate factors are chosen, with one for all layers.
        choice: of gate factors for `model.convert.target` or `target_ms`, if this run has made it.
        starts_from: the weights that the network starts from and what was left out of them, once it has them.

    Raises:
        RecipeError: the device cannot be used, or not in this precision; the data's class names cannot be read; or the
            network's keywords do not go together or do not fit the size of the images.
    """

    def __init__(
        self,
        recipe: Recipe,
        gets_weights: bool = False,
        network: torch.nn.Module | None = None,
        notify: Callable[[str], None] = lambda text: None,
    ):
        self.device = use_device(recipe.device)
        self.recipe = resolve(recipe, self.device)
        init_process_group(self.device)
        self.classes = class_names(recipe.data)
        self.input_size = recipe.data.input_size
        self._network, self._trains = network, True
        self._teacher: torch.nn.Module | None = None
        self.cost = self._cost()
        self.choice: GateChoice | None = None
        self.starts_from: str | None = None
        self._gets_weights, self._notify = gets_weights, notify

    @cached_property
    def learner(self) -> RecipeLearner:
        """The fastai Learner, built when first used: Python's, NumPy's and torch's random numbers are seeded then.

        Raises:
            RecipeError: the data cannot be read, or timm's optimizer cannot be used here.
            CheckpointError: the weights to start from cannot be read or fetched, or do not fit.
        """
        set_seed(self.recipe.train.seed)
        network = prepare(self._create_network(), self.recipe.train, self.device)
        recipe = self.recipe
        if file := recipe.train.teacher_file if self._trains else None:
            self._teacher = load_teacher(file, recipe, self.classes)
        return assemble(recipe, build_dataloaders(recipe.data, self.device, self.classes), network, self._teacher)

    def fit(self, console: Console, folder: Path | None = None) -> Path:
        """Train into a run folder and return its path. Of several processes, the main one shows and writes.

        Args:
            console: where to show the progress.
            folder: of a run to resume, from `find_resumable_run`; None for a new one.

        Raises:
            RecipeError: the run folder cannot be made, or a logger is not installed.
            CheckpointError: the state of the interrupted run cannot be read, or does not fit.
            TrainingError: the loss or the weights are NaN or Inf.
            Interrupted: SIGINT or SIGTERM came, and the run was saved.
            LostProcess: another process of this run, or one that reads its images, has died.
            WriteError: a file of the run, or of a logger, cannot be written. What was written before is intact, and
                the run can be resumed.
        """
        learn, recipe = self.learner, self.recipe  # as it is once there is a learner
        folder, stage = prepare_run_folder(recipe, folder)
        if stage is Stage.COMPLETE:  # by the time that another process died
            return folder
        state = read_state(folder / STATE) if stage is Stage.INTERRUPTED else None
        diagnosis = Diagnosis(len(self.classes))
        recorder = RunRecorder(folder, recipe, self.classes, self.cost, diagnosis.findings, self.starts_from)
        save_state = SaveState(folder / STATE, recipe.train.seed, state)
        display = TrainingDisplay(console, recorder.rows, recipe.log.print_every)
        with lock_run(folder):
            if self.choice and launch.is_main_process():
                write_atomically(folder / "allocation.csv", self.choice.table())
            callbacks = [save_state, diagnosis, recorder]
            if launch.is_main_process():
                callbacks += [display, *logging_callbacks(recipe, folder, bool(dgc_layers(learn.model)))]
            try:
                with _callbacks(learn, callbacks), save_state.on_signals(), _errors_of(learn, recorder):
                    learn.fit_recipe(save_state.first_epoch)
            finally:
                display.close()
        if save_state.stopped:
            message = f"interrupted {save_state.stopped}, and saved; to go on: {_resume_command(folder)}"
            raise Interrupted(message, save_state.stop)
        return folder

    def load(self, weights: Path) -> None:
        """Load the network's weights from a file, as `load_checkpoint`.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another network.
        """
        self._gets_weights, self._trains = True, False
        self.recipe = self.recipe.with_choice_of(saved_recipe(weights))
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

    def _cost(self) -> Budget:
        model = self.recipe.model
        if self._network is None:
            return network_cost(model, len(self.classes), self.input_size)
        converted = convert_model(deepcopy(self._network).to("meta"), model, self.input_size)
        return checked_cost(converted, len(self.classes), self.input_size)

    def _create_network(self) -> torch.nn.Module:
        if self._network is not None:
            return self._converted(self._network, has_weights=True)
        model, teaches = self.recipe.model, self._trains and self.recipe.train.teacher == "before"
        network = create_unconverted(model, len(self.classes), self.input_size)
        weights = None if self._gets_weights and not teaches else self._read_weights()
        if teaches and (weights is None or weights.have_gates):
            reason = f"{weights.source} is of one with gates" if weights else NO_WEIGHTS
            raise CheckpointError(f"train.teacher: there is no network before model.convert: {reason}")
        if weights and model.convert and weights.have_gates:
            self.recipe = self.recipe.with_choice_of(saved_recipe(weights.source))
            settings = self.recipe.model.convert
            if self._trains and settings and settings.has_to_choose:
                raise CheckpointError(
                    f"{weights.source}: has gates; a target starts from the weights of a network without"
                )
        elif weights:
            self.starts_from = self._load_before(network, weights, teaches)
        network = self._converted(network, has_weights=bool(self.starts_from))
        if weights and not self.starts_from:  # they are of the converted network
            self.starts_from = load_weights(network, weights)
        return network

    def _load_before(self, network: torch.nn.Module, weights: Weights, teaches: bool) -> str:
        try:
            return load_weights(network, weights, with_classifier=teaches)
        except OtherClasses as error:
            raise CheckpointError(f"{error}; `compress` trains the network before first") from None

    def _converted(self, network: torch.nn.Module, has_weights: bool) -> torch.nn.Module:
        """A network with the DGC layers of the recipe; the gate factors are chosen first if that is left to do."""
        self._keep_teacher(network)
        settings = self.recipe.model.convert
        if settings and settings.has_to_choose and not self._gets_weights:
            if has_weights:
                self.choice = choose_gate_factors(network, self.recipe, self.classes, self.device, self._notify)
                self.recipe = self.recipe.with_gate_factor(self.choice.gate_factor)
            elif settings.target_ms:
                raise RecipeError("model.convert.target_ms: it is for trained networks; set model.weights, or target")
        network = convert_model(network, self.recipe.model, self.input_size)
        if settings and (settings.target or settings.target_ms):  # whose gate factors are known only now
            self.cost = checked_cost(network, len(self.classes), self.input_size)
        return network

    def _keep_teacher(self, network: torch.nn.Module) -> None:
        if self._trains and self.recipe.train.teacher == "before":
            self._teacher = deepcopy(network)

    def _read_weights(self) -> Weights | None:
        model = self.recipe.model
        if not model.weights:
            return None
        try:
            return read_weights(model, self.input_size[0])
        except CheckpointError as error:
            if model.weights != "auto":
                raise
            if launch.is_main_process():
                _logger.warning("model.weights: %s; starting from random weights", error)
            return None


def build_learner(recipe: Recipe, model: torch.nn.Module | None = None) -> RecipeLearner:
    """A fastai Learner with the recipe's data, network, optimizer, gates and precision, ready to fit.

    Seeds Python's, NumPy's and torch's random numbers with `train.seed` first. A `TrainingRun` keeps a run folder, too.

    Args:
        recipe: from `load_recipe`.
        model: a network of your own, to train instead of that of `model.arch`, with the weights that it has. It is
            changed: `model.convert` gives it DGC layers, and it moves to the device.

    Raises:
        RecipeError: the data, the network, the optimizer or the device cannot be used.
        CheckpointError: the weights to start from cannot be read or fetched, or do not fit.
    """
    return TrainingRun(recipe, network=model).learner


@contextmanager
def _callbacks(learn: Learner, callbacks: list[Callback]) -> Iterator[None]:
    with learn.removed_cbs(learn._grab_cbs(ProgressCallback)), learn.no_logging(), learn.added_cbs(callbacks):
        yield


@contextmanager
def _errors_of(learn: RecipeLearner, recorder: RunRecorder) -> Iterator[None]:
    """Add to the errors of a fit what is left of the run, and how to resume it."""
    resume = _resume_command(recorder.folder)
    next_step = "all are started again" if launch.will_restart() else f"to go on: {resume}"
    try:
        with lost_processes_named(f"the run is saved up to its last epoch; {next_step}"):
            yield
    except TrainingError as error:
        raise TrainingError(f"{error}; {_what_is_left(recorder, learn.non_finite_loss.images)}") from None
    except WriteError as error:
        raise WriteError(f"{error}, then go on: {resume}") from None
    except OSError as error:  # from the files of loggers, or from the terminal
        raise WriteError(f"{error}; mend that, then go on: {resume}") from None


def _resume_command(folder: Path) -> str:
    return f"{program()} {folder / 'recipe.yaml'} --resume"


def _what_is_left(recorder: RunRecorder, images: list[str]) -> str:
    """After a loss of NaN or Inf: the file with the names of the images, and the last good weights."""
    folder, found = recorder.folder, []
    if images:
        names = folder / "nonfinite.txt"
        if launch.is_main_process():
            write_atomically(names, "\n".join(images) + "\n")
        found.append(f"all names are in {names}")
    if recorder.rows:
        found.append(f"the last good weights are {folder / 'last.safetensors'}, of epoch {recorder.rows[-1]['epoch']}")
    else:
        found.append("no epoch had ended before")
    return "; ".join(found)
