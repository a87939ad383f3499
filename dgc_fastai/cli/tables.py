"""What a terminal shows of a recipe, of a network's cost and of a run. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from ..recipe.schema import Recipe
from ..training.run_summary import read_run
from ..utils.invocation import display_path, program

if TYPE_CHECKING:
    from ..models.cost import Budget
    from ..training.gate_choice import GateChoice

__all__ = ["show_choice", "show_cost", "show_layers", "show_recipe", "show_result", "show_verdict"]


def show_recipe(console: Console, recipe: Recipe) -> None:
    """Print the recipe with every default and override."""
    text = Syntax(recipe.to_yaml().rstrip(), "yaml", background_color="default", word_wrap=True)
    console.print(Panel(text, title=recipe.name, title_align="left", expand=False))


def show_verdict(console: Console, cost: "Budget") -> None:
    """Print that a recipe can be trained, and what its network costs, in one line."""
    text = f"recipe, data, device OK; {_millions(cost.macs)} MACs, {_share(cost.macs, cost.macs_dense)} of dense"
    console.print(text, style="bold", highlight=False, soft_wrap=True)


def show_cost(console: Console, cost: "Budget") -> None:
    """Print what a network costs for one image, and what each number counts."""
    rows = [
        ("MACs, target", cost.macs, "multiply-accumulates after training, gates closed"),
        ("MACs, now", cost.macs_now, "with the channels kept at present"),
        ("MACs, dense", cost.macs_dense, "with ordinary convolutions"),
        ("authors' count", cost.operations, "MACs plus ReLU, pooling, gates and biases"),
        ("parameters", cost.parameters, ""),
    ]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for name, number, meaning in rows:
        table.add_row(name, f"{number:,.0f}", meaning)
    console.print("Cost for one image:", style="bold")
    console.print(table)


def show_layers(console: Console, cost: "Budget") -> None:
    """Print what each layer of a network costs."""
    table = Table(title="MACs by layer", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for name in ("output", "target", "now", "dense", "params"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in cost.layers:
        numbers = layer.macs, layer.macs_now, layer.macs_dense, layer.parameters
        table.add_row(layer.name, "x".join(map(str, layer.output)), *map(_quantity, numbers))
    table.add_section()
    totals = cost.macs, cost.macs_now, cost.macs_dense, cost.parameters
    table.add_row("total", "", *map(_quantity, totals), style="bold")
    console.print(table)


def show_choice(console: Console, choice: "GateChoice") -> None:
    """Print which gate factors were chosen, and what single layers are worth."""
    title = "Gate factors, chosen by what each layer is worth"
    style: dict = dict(title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table = Table(title=title, **style)
    table.add_column("layer", overflow="fold")
    for name in ("MACs dense", "loss", "factor", "MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in choice.rows:
        numbers = _quantity(row["macs_dense"]), f"{row['loss_at_half']:.2g}", f"{row['gate_factor']:.3g}"
        table.add_row(row["layer"], *numbers, _quantity(row["macs"]))
    console.print(table)
    text = (
        "loss: how far the outputs move if this layer alone keeps half of its channels (Kullback-Leibler divergence in "
        f"nats, {choice.images:,} training images). factor: 1 leaves the convolution as it is."
    )
    console.print(text, style="dim", highlight=False)
    if choice.ms:
        text = (
            f"An image takes {choice.ms['reached']:.3g} ms deployed like this, and {choice.ms['dense']:.3g} ms dense."
        )
        console.print(text, highlight=False, soft_wrap=True)


def show_result(console: Console, folder: Path) -> None:
    """Print what a run reached, where its best weights are, how to use them, and what went wrong."""
    _, summary = read_run(folder)
    best, place = summary["best"], display_path(folder)
    share = _share(summary["macs"], summary["macs_dense"])
    lines = [
        f"The run is in {place}.",
        f"Best: top-1 {100 * best['top_1']:.2f} % in epoch {best['epoch']}, with {100 * best['inactive']:.0f} % of the "
        f"channels inactive; {_millions(summary['macs'])} MACs, {share} of dense.",
        f"Its weights: {place}/best.safetensors"
        + (f" (started from {summary['starts_from']})" if summary.get("starts_from") else ""),
        f"To classify images: {program()} predict {place} IMAGE ...",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for problem in summary.get("problems", []):
        console.print(f"Problem: {problem}", style="yellow", soft_wrap=True, highlight=False, markup=False)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f} M"


def _quantity(number: float) -> str:
    """Three digits and a unit: 1234567 -> 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            digits = max(0, 3 - len(str(int(number / size))))
            return f"{number / size:.{digits}f} {unit}"
    return f"{number:.0f}"
