"""Where runs lie: new folders, and those of interrupted runs."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from ..recipe.loading import differences, load_recipe
from ..recipe.schema import Recipe
from ..utils import launch
from ..utils.errors import RecipeError, WriteError
from ..utils.files import file_lock, write_atomically
from .distributed import from_first, largest

LAUNCH = "launch.txt"  # in the folder of a run that torchrun has started: which launch took it last

NEW, INTERRUPTED, COMPLETE = range(3)


def run_to_go_on_with(recipe: Recipe, resume: bool) -> tuple[Optional[Path], str]:
    """The folder that all processes are to go on with, if any, and a line that says so.

    It is that of the newest interrupted run of the recipe, if `resume` asks for it. After torchrun has started all
    processes again, because one had died, it is the one that they had begun, wherever that run has come to.
    """
    folder, found = None, ""
    restarted = largest(launch.restart_count())  # each machine's launcher counts for itself
    if launch.is_main_process():
        if restarted and launch.launch_id():
            folder = _begun_by_this_launch(recipe)
            found = f"A process has died, and all were started again: going on with {folder}." if folder else ""
        elif resume or restarted:
            folder, found = interrupted_run(recipe)
    return _agreed(folder), found


def _begun_by_this_launch(recipe: Recipe) -> Optional[Path]:
    """The folder that this launch has last taken for a recipe; an earlier one may have had the same name."""
    for path in sorted(recipe.runs.glob(f"*/{LAUNCH}"), key=lambda path: path.stat().st_mtime, reverse=True):
        if path.read_text().strip() == launch.launch_id():
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
        with file_lock(folder / "recipe.yaml"):
            yield
    except BlockingIOError:
        raise RecipeError(f"output: {folder} is going on in another process") from None


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
