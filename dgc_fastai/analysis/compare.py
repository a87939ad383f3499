"""Run folders side by side. Imports no torch: the files of a run need none."""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..recipe.loading import differences, value_at
from ..recipe.schema import Recipe
from ..training.run_summary import read_run
from ..training.sweep_table import group_rows

__all__ = ["show_comparison", "show_groups"]

Run = tuple[Path, Recipe, dict[str, Any]]


def show_comparison(console: Console, folders: Sequence[Path]) -> None:
    """Print runs, best first: accuracy of the best epoch, cost and time, folders, and how their recipes differ.

    Raises:
        UserError: a folder is not that of a run that has finished an epoch.
    """
    runs: list[Run] = [(folder, *read_run(folder)) for folder in folders]
    runs = [(folder, recipe.without_choice(), summary) for folder, recipe, summary in runs]
    runs.sort(key=lambda run: -run[2]["best"]["top_1"])
    console.print(_results(runs))
    for number, (folder, *_) in enumerate(runs, 1):
        console.print(f"{number:3}  {folder}", highlight=False, markup=False, soft_wrap=True)
    keys = sorted({key for _, recipe, _ in runs for key in differences(runs[0][1], recipe, ignore=("name", "output"))})
    if keys:
        console.print()
        _show_differences(console, keys, [recipe for _, recipe, _ in runs])


def show_groups(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print the mean over seeds of each combination of a sweep, where there are several."""
    groups = group_rows(rows)
    if all(group["seeds"] == 1 for group in groups):
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("mean over seeds")
    for heading in ("top-1\n%", "std. error\n%", "seeds", "MACs\nM"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in sorted(groups, key=lambda group: -group["top_1"]):
        error = "" if group["error"] is None else f"{100 * group['error']:.2f}"
        numbers = f"{100 * group['top_1']:.2f}", error, str(group["seeds"]), f"{group['macs'] / 1e6:,.2f}"
        table.add_row(escape(group["label"]), *numbers)
    console.print()
    console.print(table)


def _results(runs: Sequence[Run]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    headings = ["run", "top-1\n%", "top-5\n%", "inactive\n%", "MACs\nM", "of dense\n%", "params\nM", "epochs", "time"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (_, recipe, summary) in enumerate(runs, 1):
        best = summary["best"]
        table.add_row(
            str(number),
            *(f"{100 * best[name]:.2f}" for name in ("top_1", "top_5", "inactive")),
            f"{summary['macs'] / 1e6:,.2f}",
            f"{100 * summary['macs'] / summary['macs_dense']:.0f}",
            f"{summary['parameters'] / 1e6:,.2f}",
            f"{summary['epochs']}/{recipe.train.epochs}",
            str(timedelta(seconds=round(summary["seconds"]))),
        )
    return table


def _show_differences(console: Console, keys: Sequence[str], recipes: Sequence[Recipe]) -> None:
    """Print the keys in which recipes differ: a row per key with a column per run, or a line per value if too wide."""
    values = {key: [_value(recipe, key) for recipe in recipes] for key in keys}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("recipe key", no_wrap=True)
    for number in range(1, len(recipes) + 1):
        table.add_column(f"run {number}", no_wrap=True)
    for key in keys:
        table.add_row(key, *map(escape, values[key]))
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(table)
        return
    for key in keys:
        console.print(key, style="bold", highlight=False, markup=False)
        for value in dict.fromkeys(values[key]):
            numbers = [str(number) for number, other in enumerate(values[key], 1) if other == value]
            text = f"    {value}: run{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _value(recipe: Recipe, key: str) -> str:
    value = value_at(recipe, key)
    return "-" if value is None else json.dumps(value).strip('"')
