"""One recipe, several values of some of its keys: a run for each combination, and one picture of them all."""

import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from ..recipe.loading import load_recipe
from ..recipe.machine import check_machine
from ..utils.errors import RecipeError
from ..utils.figures import to_png
from ..utils.files import write_atomically, write_table
from .run import TrainingRun
from .run_summary import read_run

__all__ = ["combinations", "draw_sweep", "plan_sweep", "sweep"]


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


def plan_sweep(recipe: Path, overrides: Sequence[str]) -> tuple[Path, dict[str, TrainingRun]]:
    """The folder of a sweep, not made yet, and by label each of its runs.

    Raises:
        RecipeError: nothing is swept, or one of the combinations cannot be run.
    """
    chosen = combinations(overrides)
    if len(chosen) < 2:
        raise RecipeError("a sweep needs a key with several values, such as model.gate_factor=0.25,0.5,1")
    first = load_recipe(recipe, chosen[0])
    folder = first.runs / f"{first.name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    plans = {}
    for combination in chosen:
        # Only what differs makes the label.
        swept = [part for part, *others in zip(combination, *chosen) if len(set(others)) > 1]
        label = " ".join(re.sub(r"^\w+\.", "", part) for part in swept)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{first.name}-{label.replace('=', '-')}")[:100].rstrip("-")
        plan = load_recipe(recipe, [*combination, f"name={name}", f"output={folder}"])
        check_machine(plan)
        plans[label] = TrainingRun(plan)
    return folder, plans


def sweep(folder: Path, plans: dict[str, TrainingRun], console: Console) -> list[Path]:
    """Train every plan of `plan_sweep`, one after the other; `sweep.csv` and `sweep.png` grow with them.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the runs that are done, and the state of this one, are kept.
    """
    runs, rows, plans, count = [], [], dict(plans), len(plans)
    for number, label in enumerate(list(plans), 1):
        console.print(f"Run {number} of {count}: {label}", style="bold", highlight=False)
        runs.append(plans.pop(label).fit(console))  # and lets go of its network and data
        _, summary = read_run(runs[-1])
        costs = {key: summary[key] for key in ("macs", "macs_dense", "operations", "parameters", "seconds")}
        rows.append({"run": runs[-1].name, "label": label, "top_1": summary["best"]["top_1"], **costs})
        write_table(folder / "sweep.csv", rows)
        write_atomically(folder / "sweep.png", draw_sweep(rows, folder.name))
    return runs


def draw_sweep(rows: Sequence[dict], title: str) -> bytes:
    """A PNG of accuracy against multiply-accumulates, a point a run."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    markers = itertools.cycle("os^Dv<>P*X")
    for row, marker in zip(rows, markers):
        axes.plot(row["macs"] / 1e6, 100 * row["top_1"], marker, markersize=8, label=row["label"])
    dense = {row["macs_dense"] for row in rows}
    if len(dense) == 1:
        axes.axvline(dense.pop() / 1e6, color="0.6", linestyle="--", zorder=0, label="cost of the dense network")
    figure.legend(loc="outside right upper", fontsize="small")
    axes.set_title(title)
    axes.set_xlabel("multiply-accumulates of one image (millions)")
    axes.set_ylabel("top-1 of the best epoch (%)")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    return to_png(figure)
