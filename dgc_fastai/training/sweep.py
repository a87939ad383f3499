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

from ..recipe.loading import differences, load_recipe
from ..recipe.machine import check_machine, cuda_devices
from ..recipe.schema import Recipe
from ..utils.errors import Interrupted, RecipeError, TrainingError
from ..utils.files import write_atomically, write_table
from .run import TrainingRun
from .run_folder import finished_run
from .run_summary import read_run
from .sweep_table import draw_sweep

__all__ = ["Sweep", "combinations", "default_jobs", "plan_sweep"]

SEED = "seed"


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


def plan_sweep(recipes: Sequence[Path], overrides: Sequence[str], resume: bool = False) -> "Sweep":
    """A sweep, of which nothing is written yet.

    Args:
        recipes: recipe files, or names of recipes.
        overrides: for all of them, with several values each.
        resume: go on with the newest sweep of the same runs, if there is one.

    Raises:
        RecipeError: there is nothing to compare, or one of the combinations cannot be run.
    """
    chosen = combinations(overrides)
    if len(chosen) * len(recipes) < 2:
        raise RecipeError("a sweep needs a key with several values, such as model.gate_factor=0.25,0.5,1")
    first = load_recipe(recipes[0], chosen[0])
    folder = first.runs / f"{first.name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    swept = [len({combination[place] for combination in chosen}) > 1 for place in range(len(overrides))]
    runs: list[PlannedRun] = []
    for recipe, combination in itertools.product(recipes, chosen):
        stem = load_recipe(recipe, combination).name
        # Only what differs makes the label.
        parts = [re.sub(r"^\w+\.", "", part) for part, differs in zip(combination, swept) if differs]
        unseeded = [part for part in parts if not part.startswith(f"{SEED}=")]
        label, group = (" ".join([stem] * (len(recipes) > 1) + kept) for kept in (parts, unseeded))
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", " ".join([stem, *parts]).replace("=", "-"))[:90].rstrip("-")
        name = f"{len(runs) + 1:03d}-{name}"  # unique, and in the order of the plan
        plan = load_recipe(recipe, [*combination, f"name={name}", f"output={folder}"])
        check_machine(plan)
        TrainingRun(plan)  # which checks the classes, the network and its cost
        runs.append(PlannedRun(label, group or stem, plan))
    sweep = Sweep(folder, runs)
    return (_begun(sweep) if resume else None) or sweep


def _begun(sweep: "Sweep") -> "Sweep | None":
    """The newest sweep that has planned the same runs."""
    folders = sorted(sweep.folder.parent.glob(f"{sweep.folder.name.rpartition('-sweep-')[0]}-sweep-*"), reverse=True)
    for folder in folders:
        found = sorted((folder / "plan").glob("*.yaml"))
        if [path.stem for path in found] != [run.recipe.name for run in sweep.runs]:
            continue
        with suppress(RecipeError):  # of another version
            recipes = [load_recipe(path) for path in found]
            if not any(differences(own, run.recipe, ("output", "log")) for own, run in zip(recipes, sweep.runs)):
                runs = [PlannedRun(run.label, run.group, own) for run, own in zip(sweep.runs, recipes)]
                return Sweep(folder, runs, is_resumed=True)
    return None


def default_jobs(recipe: Recipe) -> int:
    """How many runs go side by side: on a CPU one per core, since several single threads beat one run on all cores."""
    on_gpu = recipe.device.startswith("cuda") or (recipe.device == "auto" and cuda_devices() > 0)
    return 1 if on_gpu else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Sweep:
    """The runs of a sweep, and the folder for them.

    Attributes:
        is_resumed: the folder is that of a sweep that was stopped.
        failed: by label, why a run failed.
    """

    folder: Path
    runs: list[PlannedRun]
    is_resumed: bool = False
    failed: dict[str, str] = field(default_factory=dict)

    def train(self, console: Console, jobs: int) -> list[Path]:
        """Train what is not finished, `jobs` runs at a time; `sweep.csv` and `sweep.png` grow with them.

        Args:
            console: where to show the progress.
            jobs: with several, each gets its share of the cores.

        Returns:
            The folders of the runs, in the order of the plan.

        Raises:
            Interrupted: SIGINT or SIGTERM came; what is done is kept, and the runs under way were saved.
            TrainingError: some runs failed; all others are finished.
        """
        (self.folder / "plan").mkdir(parents=True, exist_ok=True)
        for run in self.runs:
            write_atomically(self._plan(run), run.recipe.to_yaml())
        waiting = [run for run in self.runs if not finished_run(run.recipe)]
        if len(waiting) < len(self.runs):
            console.print(f"{len(self.runs) - len(waiting)} of {len(self.runs)} runs are finished already.")
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
                    children[self._start(run, jobs, console.quiet)] = run
                time.sleep(0.1)
                for child in [child for child in children if child.poll() is not None]:
                    self._finish(children.pop(child), child, bool(stop))
                show(list(children.values()))
        if stop:
            again = "the same command with --resume"
            raise Interrupted(f"interrupted, and saved in {self.folder}; to go on: {again}", stop[0])
        if self.failed:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in list(self.failed.items())[:3])
            raise TrainingError(f"{len(self.failed)} of {len(self.runs)} runs failed: {reasons}")
        return [folder for folder in (finished_run(run.recipe) for run in self.runs) if folder]

    def _plan(self, run: PlannedRun) -> Path:
        return self.folder / "plan" / f"{run.recipe.name}.yaml"

    def _log(self, run: PlannedRun) -> Path:
        return self._plan(run).with_suffix(".log")

    def _start(self, run: PlannedRun, jobs: int, quiet: bool) -> subprocess.Popen:
        package = Path(__file__).parents[2]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "dgc_fastai", "train", str(self._plan(run)), "--resume"]
        if jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        # In a session of their own: a terminal's Ctrl-C reaches this process only, which passes it on.
        if jobs > 1 or quiet:
            with open(self._log(run), "w") as log:
                return subprocess.Popen(
                    [*command, "--quiet"], env=environment, stdout=log, stderr=log, start_new_session=True
                )
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def _finish(self, run: PlannedRun, child: subprocess.Popen, stopped: bool) -> None:
        if finished_run(run.recipe):
            self._write()
        elif not stopped:
            text = self._log(run).read_text() if self._log(run).exists() else ""
            lines = [line for line in text.splitlines() if line.strip()]
            self.failed[run.label] = lines[-1].removeprefix("error: ") if lines else f"exit code {child.returncode}"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each finished run."""
        rows = []
        for run in self.runs:
            if folder := finished_run(run.recipe):
                _, summary = read_run(folder)
                costs = {key: summary[key] for key in ("macs", "macs_dense", "operations", "parameters", "seconds")}
                found = {"top_1": summary["best"]["top_1"], **costs}
                labels = {"label": run.label, "group": run.group, "seed": run.recipe.train.seed}
                rows.append({"run": folder.name, **labels, **found})
        return rows

    def _write(self) -> None:
        if rows := self.rows():
            write_table(self.folder / "sweep.csv", rows)
            write_atomically(self.folder / "sweep.png", draw_sweep(rows, self.folder.name))

    @contextmanager
    def _progress(self, console: Console, jobs: int) -> Iterator[Any]:
        """Shows one bar for all epochs of all runs, if the runs do not show themselves."""
        if jobs == 1 or not console.is_terminal:
            yield lambda running: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("epochs", total=sum(run.recipe.train.epochs for run in self.runs))

            def show(running: Sequence[PlannedRun]) -> None:
                epochs = sum(_epochs_done(run.recipe) for run in self.runs)
                names = ", ".join(run.label for run in running)
                progress.update(task, completed=epochs, description=names[: max(10, console.width - 40)])

            yield show


def _epochs_done(recipe: Recipe) -> int:
    done = 0
    for path in recipe.runs.glob(f"{recipe.name}-*/history.csv"):
        with suppress(OSError):
            done = max(done, path.read_text().count("\n") - 1)
    return done


@contextmanager
def _stop_signals(children: dict[subprocess.Popen, PlannedRun]) -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to the children, which save their runs, and collects them."""
    stop: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        stop.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:  # left by an error of ours
            child.kill()
