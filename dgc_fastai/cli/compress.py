"""The command that compresses a network: before, after, and what it was worth."""

import json
import shlex
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..utils.errors import Interrupted
from ..utils.invocation import display_path, program
from .app import TRAIN, Overrides, RecipeFile, app, console, load, results
from .final_report import write_final_report
from .train import fit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..recipe.schema import Recipe

RESUME = "Continue the newest interrupted run of this recipe, or measure a finished one again."


@app.command(
    group=TRAIN,
    help_epilogue=f"""\
Examples:
  {program()} compress compress_resnet18 data.path=~/pictures
  {program()} compress mine.yaml model.convert.gate_factor=0.3 --resume""",
)
def compress(
    recipe: RecipeFile, /, *overrides: Overrides, resume: Annotated[bool, Parameter(help=RESUME)] = False
) -> None:
    """Train RECIPE, which converts a network, and say what that was worth.

    Accuracy, cost and milliseconds before and after. If model.weights were made for other classes, or are not set, the
    dense network is trained first, by the same recipe; it is kept, and taken again the next time.
    """
    plan = load(recipe, overrides)
    from ..recipe.machine import check_machine

    check_machine(plan)
    with console.status("Starting torch and fastai, reading the weights"):
        from ..training.compression import check_compression, has_classifier, starting_from
        from ..training.run_folder import finished_run, interrupted_run

        check_compression(plan)
        is_ready = has_classifier(plan)
    with _resumable(recipe, overrides):
        before = None
        if not is_ready:
            before = _train_dense(plan, resume)
            plan = starting_from(plan, before)
        folder = finished_run(plan) if resume and not interrupted_run(plan)[0] else None
        if folder:
            _tell(f"{display_path(folder)} is trained already, and is measured again.")
        else:
            folder = fit(plan, resume)
        from ..analysis.compression import measure_compression

        found = measure_compression(plan, before, folder, console)
    _show(results, found, folder)
    if plan.log.report:
        write_final_report(folder, json.loads((folder / "summary.json").read_text())["seconds"])


def _tell(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _resumable(recipe: Path, overrides: "Iterable[str]") -> "Iterator[None]":
    """Interruptions name this command, and not `train`, as the way to go on."""
    command = f"{program()} compress {shlex.join([str(recipe), *overrides])} --resume"
    try:
        yield
    except Interrupted as stop:
        message, number = stop.args
        raise Interrupted(f"{message.partition('; to go on')[0]}; to go on: {command}", number) from None
    except KeyboardInterrupt:
        text = f"interrupted; what is trained is kept; to go on: {command}"
        raise Interrupted(text, signal.SIGINT) from None


def _train_dense(plan: "Recipe", resume: bool) -> Path:
    """The run folder of the dense network: trained before, or now."""
    from ..training.compression import dense_recipe
    from ..training.run_folder import finished_run

    dense = dense_recipe(plan)
    if folder := finished_run(dense):
        _tell(f"The dense network is that of {display_path(folder)}; remove this folder to train it again.")
        return folder
    _tell("First, the dense network is trained: model.weights are not those of a network for these classes.")
    return fit(dense, resume)


def _show(console: Console, found: dict[str, Any], folder: Path) -> None:
    """Print a compression: the sentence, the numbers before and after, what to deploy, and what to try."""
    from ..analysis import compression_text as text

    console.print(_cost_table(found))
    console.print(_speed_table(found))
    for line in (text.machine_line(found), *found["speed"]["left_out"], text.how_trained(found)):
        console.print(line, style="dim", soft_wrap=True, highlight=False, markup=False)
    console.print()
    console.print(text.answer(found), style="bold", soft_wrap=True, highlight=False, markup=False)
    console.print(text.verdict(found), soft_wrap=True, highlight=False, markup=False)
    if lines := text.advice(found):
        console.print("To try:", style="bold")
        for line in lines:
            console.print(f"- {line}", soft_wrap=True, highlight=False, markup=False)
    console.print()
    for line in text.deployment(program(), display_path(folder)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _cost_table(found: dict[str, Any]) -> Table:
    from ..analysis.compression_text import cost_rows

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in cost_rows(found):
        table.add_row(*row)
    return table


def _speed_table(found: dict[str, Any]) -> Table:
    from ..analysis.compression_text import batch_title, batches, precisions, speed_rows

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("milliseconds", no_wrap=True)
    for batch in batches(found):
        table.add_column(batch_title(batch), justify="right", no_wrap=True)
    for precision in precisions(found):
        table.add_row(precision, style="bold")
        for title, *cells in speed_rows(found, precision):
            table.add_row(f"  {title}", *cells)
        table.add_section()
    return table
