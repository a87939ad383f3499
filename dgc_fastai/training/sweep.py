"""Recipes, several values of some of their keys: a run for each combination, and one table and picture of them all.

The runs are processes of their own, several side by side. A sweep that was stopped can be resumed: its folder holds the
recipe of every run before the first one starts.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..data.classes import class_names
from ..models.factory import network_cost
from ..recipe.loading import differences, load_recipe
from ..recipe.machine import check_machine, cuda_devices
from ..recipe.schema import Recipe
from ..utils import launch
from ..utils.errors import Interrupted, RecipeError, TrainingError
from ..utils.files import file_lock, write_atomically, write_table
from .run_folder import finished_run
from .run_summary import read_run
from .sweep_table import draw_sweep

__all__ = ["Sweep", "combinations", "default_jobs", "plan_sweep"]

SEED = "seed"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the values in overrides such as `model.gate_factor=0.25,0.5` or `model.growth=[4],[8]`."""
    choices = []
    for override in overrides:
        key, equals, text = override.partition("=")
        values, depth = [""], 0
        for sign in text:
            depth += (sign in "[{") - (sign in "]}")
            if sign == "," and depth == 0:
                values.append("")
            else:
                values[-1] += sign
        choices.append([f"{key}{equals}{value}" for value in values])
    return [list(combination) for combination in itertools.product(*choices)]


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep: its label, the label without the seed, and its recipe."""

    label: str
    group: str
    recipe: Recipe


def plan_sweep(
    recipes: Sequence[Path], overrides: Sequence[str], resume: bool = False, notes: list[str] | None = None
) -> "Sweep":
    """A sweep, of which nothing is written yet.

    Args:
        recipes: recipe files, or names of recipes.
        overrides: for all of them, with several values each.
        resume: go on with the newest sweep of the same runs, if there is one.
        notes: as of `load_recipe`, for the first run.

    Raises:
        RecipeError: there is nothing to compare, two runs are the same, or one of the combinations cannot be run.
    """
    chosen = combinations(overrides)
    if len(chosen) * len(recipes) < 2:
        load_recipe(recipes[0], chosen[0])  # what is wrong with the recipe is said first
        raise RecipeError("a sweep needs a key with several values, such as model.gate_factor=0.25,0.5,1")
    swept = [len({combination[place] for combination in chosen}) > 1 for place in range(len(overrides))]
    first: Recipe | None = None
    runs: list[PlannedRun] = []
    for recipe, combination in itertools.product(recipes, chosen):
        plan = load_recipe(recipe, combination, None if first else notes)
        first = first or plan
        # Only what differs makes the label.
        parts = [re.sub(r"^\w+\.", "", part) for part, differs in zip(combination, swept) if differs]
        unseeded = [part for part in parts if not part.startswith(f"{SEED}=")]
        label, group = (" ".join([plan.name] * (len(recipes) > 1) + kept) for kept in (parts, unseeded))
        if label in (run.label for run in runs):
            raise RecipeError(f"two runs of this sweep are called {label!r}; give each recipe a name of its own")
        check_machine(plan, resume)
        network_cost(plan.model, len(class_names(plan.data)), plan.data.input_size)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", " ".join([plan.name, *parts]).replace("=", "-"))[:90].rstrip("-")
        name = f"{len(runs) + 1:04d}-{name}"  # unique, and in the order of the plan
        runs.append(PlannedRun(label, group or plan.name, plan.model_copy(update={"name": name})))
    assert first is not None
    if resume and (begun := _begun(first, runs)):
        return begun
    return Sweep(first.runs / f"{first.name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}", runs)


def _begun(first: Recipe, runs: Sequence[PlannedRun]) -> "Sweep | None":
    """The newest sweep that has planned the same runs."""
    for folder in sorted(first.runs.glob(f"{first.name}-sweep-*"), reverse=True):
        found = sorted((folder / "plan").glob("*.yaml"))
        if [path.stem for path in found] != [run.recipe.name for run in runs]:
            continue
        with suppress(RecipeError):  # of another version
            recipes = [load_recipe(path) for path in found]
            if not any(differences(own, run.recipe, ("output", "log")) for own, run in zip(recipes, runs)):
                return Sweep(folder, list(runs), is_resumed=True)
    return None


def default_jobs(recipe: Recipe) -> int:
    """How many runs go side by side: on a CPU one per core, since several single threads beat one run on all cores."""
    on_cpu = recipe.device == "cpu" or (recipe.device == "auto" and not cuda_devices())
    return launch.cores() if on_cpu else 1


@dataclass
class Sweep:
    """The runs of a sweep, and the folder for them.

    Attributes:
        is_resumed: the folder is that of a sweep that was stopped.
        finished: by name, the folders and summaries of the runs that have come to their end.
        failed: by label, why a run failed.
    """

    folder: Path
    runs: list[PlannedRun]
    is_resumed: bool = False
    finished: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        moved = [run.recipe.model_copy(update={"output": str(self.folder)}) for run in self.runs]
        self.runs = [PlannedRun(run.label, run.group, recipe) for run, recipe in zip(self.runs, moved)]

    def train(self, console: Console, jobs: int) -> None:
        """Train what is not finished, `jobs` runs at a time; `sweep.csv` and `sweep.png` grow with them.

        A run that fails does not stop the others; see `raise_failures`.

        Args:
            console: where to show the progress.
            jobs: with several, each gets its share of the cores.

        Raises:
            RecipeError: the folder cannot be made, or another process trains this sweep.
            Interrupted: SIGINT, SIGTERM or SIGHUP came; what is done is kept, and the runs under way were saved.
        """
        jobs = min(jobs, len(self.runs))
        try:
            self.folder.mkdir(parents=True, exist_ok=self.is_resumed)
            (self.folder / "plan").mkdir(exist_ok=True)
        except OSError as error:
            raise RecipeError(f"output: cannot make the folder {self.folder}: {error.strerror}") from None
        for run in self.runs:
            write_atomically(self._plan(run), run.recipe.to_yaml())
        lock = self.folder / "lock"
        lock.touch()
        try:
            with file_lock(lock):
                self._train(console, jobs)
        except BlockingIOError:
            raise RecipeError(f"output: {self.folder} is going on in another process") from None

    def _train(self, console: Console, jobs: int) -> None:
        waiting = [run for run in self.runs if not self._look_for(run)]
        if self.finished:
            console.print(f"{len(self.finished)} of {len(self.runs)} runs are finished already.")
            self._write()
        children: dict[subprocess.Popen, PlannedRun] = {}
        with _stop_signals(children) as stop, self._progress(console, jobs) as show:
            while (waiting and not stop) or children:
                while waiting and not stop and len(children) < jobs:
                    run = waiting.pop(0)
                    if jobs == 1:
                        number = self.runs.index(run) + 1
                        text = f"Run {number} of {len(self.runs)}: {run.label}"
                        console.print(text, style="bold", highlight=False, markup=False)
                    child = self._start(run, jobs, console.quiet)
                    children[child] = run
                    if stop:  # the signal came before the child could be told
                        _pass_on(child, stop[-1])
                time.sleep(0.1)
                for child in [child for child in children if child.poll() is not None]:
                    self._finish(children.pop(child), child.returncode, bool(stop), console)
                show(list(children.values()))
        if stop:
            again = "the same command with --resume"
            raise Interrupted(f"interrupted, and saved in {self.folder}; to go on: {again}", stop[0])

    def raise_failures(self) -> None:
        """Raises:
        TrainingError: some runs failed; all others are finished.
        """
        if self.failed:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in list(self.failed.items())[:3])
            raise TrainingError(f"{len(self.failed)} of {len(self.runs)} runs in {self.folder} failed: {reasons}")

    def folders(self) -> list[Path]:
        """The folders of the finished runs, in the order of the plan."""
        return [self.finished[run.recipe.name][0] for run in self.runs if run.recipe.name in self.finished]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each finished run."""
        rows = []
        for run in self.runs:
            if found := self.finished.get(run.recipe.name):
                folder, summary = found
                costs = {key: summary[key] for key in ("macs", "macs_dense", "operations", "parameters", "seconds")}
                reached = {"top_1": summary["best"]["top_1"], "starts_from": summary.get("starts_from") or "", **costs}
                labels = {"label": run.label, "group": run.group, "seed": run.recipe.train.seed}
                rows.append({"run": folder.name, **labels, **reached})
        return rows

    def _plan(self, run: PlannedRun) -> Path:
        return self.folder / "plan" / f"{run.recipe.name}.yaml"

    def _log(self, run: PlannedRun) -> Path:
        return self._plan(run).with_suffix(".log")

    def _look_for(self, run: PlannedRun) -> dict[str, Any] | None:
        """The summary of a run, if it has come to its end."""
        if folder := finished_run(run.recipe):
            self.finished[run.recipe.name] = folder, read_run(folder)[1]
        return self.finished[run.recipe.name][1] if folder else None

    def _start(self, run: PlannedRun, jobs: int, quiet: bool) -> subprocess.Popen:
        self._log(run).unlink(missing_ok=True)
        environment = dict(os.environ)
        package = Path(__file__).parents[2]
        if (package / "app.py").exists():  # a clone, which may not be installed
            paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        if jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, launch.cores() // jobs))
        # The sweep has one report, written when nothing else runs.
        command = [sys.executable, "-m", "dgc_fastai", "train", str(self._plan(run)), "log.report=false", "--resume"]
        # In a session of their own: a terminal's Ctrl-C reaches this process only, which passes it on.
        if jobs > 1 or quiet:
            with open(self._log(run), "w") as log:
                return subprocess.Popen(
                    [*command, "--quiet"], env=environment, stdout=log, stderr=log, start_new_session=True
                )
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def _finish(self, run: PlannedRun, code: int, stopped: bool, console: Console) -> None:
        summary = self._look_for(run)
        if summary:
            told = [f"{run.label}: top-1 {100 * summary['best']['top_1']:.2f} %", *summary.get("problems", [])]
            console.print(" ".join(told), highlight=False, markup=False, soft_wrap=True)
            self._write()
        elif not stopped:
            text = self._log(run).read_text(errors="replace") if self._log(run).exists() else ""
            errors = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
            died = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            self.failed[run.label] = errors[-1] if errors and code > 0 else died
            console.print(f"{run.label}: {self.failed[run.label]}", style="red", highlight=False, markup=False)

    def _write(self) -> None:
        rows = self.rows()
        write_table(self.folder / "sweep.csv", rows)
        write_atomically(self.folder / "sweep.png", draw_sweep(rows, self.folder.name))

    @contextmanager
    def _progress(self, console: Console, jobs: int) -> Iterator[Any]:
        """Shows one bar for all epochs of all runs, if the runs do not show themselves."""
        if jobs == 1 or not console.is_terminal:
            yield lambda running: None
            return
        description = TextColumn("{task.description}", markup=False)
        columns = description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("epochs", total=sum(run.recipe.train.epochs for run in self.runs))
            next_look = 0.0

            def show(running: Sequence[PlannedRun]) -> None:
                nonlocal next_look
                if time.monotonic() < next_look:
                    return
                done = sum(run.recipe.train.epochs for run in self.runs if run.recipe.name in self.finished)
                done += sum(_epochs_done(run.recipe) for run in running)
                names = ", ".join(run.label for run in running)
                progress.update(task, completed=done, description=names[: max(10, console.width - 40)])
                next_look = time.monotonic() + 1

            yield show


def _epochs_done(recipe: Recipe) -> int:
    done = 0
    for path in recipe.runs.glob(f"{recipe.name}-*/history.csv"):
        with suppress(OSError):
            done = max(done, path.read_text().count("\n") - 1)
    return done


def _pass_on(child: subprocess.Popen, number: int) -> None:
    if os.name != "nt":  # on Windows, the console's Ctrl-C reaches the children by itself
        child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def _stop_signals(children: dict[subprocess.Popen, PlannedRun]) -> Iterator[list[int]]:
    """Passes signals on to the children, which save their runs, and collects them."""
    stop: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        if not stop:  # a second one would end them while they save
            for child in children:
                _pass_on(child, number)
        stop.append(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:  # left by an error of ours
            child.terminate()
        for child in children:
            child.wait()
