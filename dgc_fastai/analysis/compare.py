"""Run folders side by side. Imports no torch: a table of files that are there needs none."""

import json
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..recipe.loading import differences
from ..recipe.schema import Recipe
from ..training.run_summary import read_run

__all__ = ["show_comparison"]


def show_comparison(console: Console, folders: Sequence[Path]) -> None:
    """Print a table of runs, best first: accuracy of the best epoch, budget, time, the keys in which they differ.

    The folders' names stand below it: beside the numbers they do not fit on a line.

    Raises:
        UserError: one is not the folder of a run that has finished an epoch.
    """
    runs = sorted(((folder, *read_run(folder)) for folder in folders), key=lambda run: -run[2]["best"]["top_1"])
    keys = sorted({key for _, recipe, _ in runs for key in differences(runs[0][1], recipe, ignore=("name", "output"))})
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    headings = [re.sub(r"[._]", r"\g<0>\n", key) for key in keys]
    headings += ["top-1\n%", "top-5\n%", "in-\nactive\n%", "MACs\nM", "of\ndense\n%", "params\nM", "epochs", "time"]
    for heading in ["run", *headings]:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (_, recipe, summary) in enumerate(runs, 1):
        best = summary["best"]
        table.add_row(
            str(number),
            *(_value(recipe, key) for key in keys),
            *(f"{100 * best[name]:.2f}" for name in ("top_1", "top_5", "inactive")),
            f"{summary['macs'] / 1e6:,.2f}",
            f"{100 * summary['macs'] / summary['macs_dense']:.0f}",
            f"{summary['parameters'] / 1e6:,.2f}",
            f"{summary['epochs']}/{recipe.train.epochs}",
            str(timedelta(seconds=round(summary["seconds"]))),
        )
    console.print(table)
    for number, (folder, *_) in enumerate(runs, 1):
        console.print(f"{number:3}  {folder}", highlight=False, markup=False, soft_wrap=True)


def _value(recipe: Recipe, key: str) -> str:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return "-" if value is None else json.dumps(value).strip('"')
