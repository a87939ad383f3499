"""Run folders: new ones, and those of interrupted runs."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path

from ..recipe.loading import differences, load_recipe
from ..recipe.schema import Recipe
from ..utils import launch
from ..utils.errors import RecipeError, WriteError
from ..utils.files import file_lock, remove_partial, write_atomically
from .collectives import all_reduce_max, broadcast_bytes

__all__ = [
    "STATE",
    "Stage",
    "as_begun",
    "find_resumable_run",
    "finished_run",
    "interrupted_run",
    "lock_run",
    "prepare_run_folder",
]

STATE = "state.pt"  # there while something is left to do
LAUNCH = "launch.txt"  # of a run that torchrun started: the launch that trained it last


class Stage(IntEnum):
    """How far a run is."""

    NEW = 0
    INTERRUPTED = 1
    COMPLETE = 2


def find_resumable_run(recipe: Recipe, resume: bool) -> tuple[Path | None, str]:
    """The folder of a run that all processes can resume, or None, and a line for the user.

    If `resume` is set, it is the newest interrupted run of the recipe. After torchrun has restarted all processes,
    because one had died, it is the run that they had begun, however far it is.
    """
    folder, found = None, ""
    restarted = all_reduce_max(launch.restart_count())  # the launcher of each machine has its own count
    if launch.is_main_process():
        if restarted and launch.launch_id():
            folder = _begun_by_this_launch(recipe)
            found = f"A process has died, and all were started again: going on with {folder}." if folder else ""
        elif resume or restarted:
            folder, found = interrupted_run(recipe)
    return _broadcast_path(folder), found


def interrupted_run(recipe: Recipe) -> tuple[Path | None, str]:
    """The newest interrupted run of a recipe below `output`, and a line for the user about what was found.

    Recipes that differ in `output` or `log` only are the same. A run that another process trains is not interrupted.
    """

    def modified(path: Path) -> float:
        return path.stat().st_mtime if path.exists() else 0.0  # of a run that has just ended

    states = sorted(recipe.runs.glob(f"*/{STATE}"), key=modified, reverse=True)
    passed = ""
    for folder in (path.parent for path in states):
        try:
            different = _differences(recipe, folder)
            with file_lock(folder / "recipe.yaml"):
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


def as_begun(recipe: Recipe, folder: Path | None) -> Recipe:
    """A recipe to resume a run with: what it leaves to the device, or to be chosen, is as when the run began.

    Raises:
        RecipeError: the folder is not that of a run.
    """
    if folder is None:
        return recipe
    begun = load_recipe(folder / "recipe.yaml")
    return recipe.resolved(begun.train.precision, begun.train.channels_last).with_choice_of(begun)


def finished_run(recipe: Recipe) -> Path | None:
    """The folder of a run of this recipe, by its name, that has come to its end; None if there is none."""
    for path in sorted(recipe.runs.glob(f"{recipe.name}-*/summary.json"), reverse=True):
        with suppress(RecipeError):  # of another version
            if not _differences(recipe, path.parent) and _stage(path.parent, recipe) is Stage.COMPLETE:
                return path.parent
    return None


def prepare_run_folder(recipe: Recipe, folder: Path | None) -> tuple[Path, Stage]:
    """The folder that all processes train into, and how far its run is; a new one unless `folder` is given.

    Raises:
        RecipeError: the folder cannot be made.
        WriteError: the recipe cannot be written into it.
    """
    stage = Stage.NEW
    if launch.is_main_process():
        if folder:
            stage = _stage(folder, recipe)
        else:
            folder = _new_run_folder(recipe)
    folder = _broadcast_path(folder)
    assert folder is not None, "the main process has one"
    return folder, Stage(all_reduce_max(stage))


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep other processes from training into a run's folder; the main process holds the lock for its own.

    Raises:
        RecipeError: another process trains this run.
    """
    if not launch.is_main_process():
        yield
        return
    try:
        with file_lock(folder / "recipe.yaml"):
            remove_partial(folder)
            if launch.launch_id():  # also in a folder that an earlier launch has begun
                write_atomically(folder / LAUNCH, launch.launch_id() + "\n")
            yield
    except BlockingIOError:
        raise RecipeError(f"output: {folder} is going on in another process") from None


def _begun_by_this_launch(recipe: Recipe) -> Path | None:
    """The folder that this launch has trained last, if its recipe is the same: launches can share an id."""
    for path in sorted(recipe.runs.glob(f"*/{LAUNCH}"), key=lambda path: path.stat().st_mtime, reverse=True):
        if path.read_text().strip() == launch.launch_id():
            return None if _differences(recipe, path.parent) else path.parent
    return None


def _differences(recipe: Recipe, folder: Path) -> list[str]:
    """The keys in which a recipe differs from that of a run; those left open are as the run began."""
    return differences(as_begun(recipe, folder), load_recipe(folder / "recipe.yaml"), ignore=("output", "log"))


def _stage(folder: Path, recipe: Recipe) -> Stage:
    if (folder / STATE).exists():
        return Stage.INTERRUPTED
    summary = folder / "summary.json"
    done = json.loads(summary.read_text())["epochs"] if summary.exists() else 0
    return Stage.COMPLETE if done == recipe.train.epochs else Stage.NEW


def _new_run_folder(recipe: Recipe) -> Path:
    """Make a folder named for the recipe and the time, and write the recipe into it."""
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
    raise AssertionError("there is always another number")


def _broadcast_path(folder: Path | None) -> Path | None:
    text = broadcast_bytes(str(folder).encode() if folder else None)
    return Path(text.decode()) if text else None
