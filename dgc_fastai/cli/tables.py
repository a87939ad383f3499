"""What a terminal shows of a recipe and of a network's cost."""

import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from ..models.cost import Budget
from ..recipe.schema import Recipe

MOST_ROWS = 40  # of the budget before a training run; about a screen


def show_recipe(console: Console, recipe: Recipe) -> None:
    """Print the recipe with every default and override written out."""
    text = Syntax(recipe.to_yaml().rstrip(), "yaml", background_color="default", word_wrap=True)
    console.print(Panel(text, title=recipe.name, title_align="left", expand=False))


def show_budget(console: Console, cost: Budget, every_layer: bool = False) -> None:
    """Print what a network costs: by layer, or by block if that is more than a screen and not asked for."""
    rows = [
        (layer.name, "x".join(map(str, layer.output)), layer.macs, layer.macs_now, layer.macs_dense, layer.parameters)
        for layer in cost.layers
    ]
    grouped = len(rows) > MOST_ROWS and not every_layer
    title = "MACs of one image: at the target gate factor, now, and dense"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("block" if grouped else "layer", no_wrap=True)
    for name in ("output", "target", "now", "dense", "params"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, shape, *numbers in _by_block(rows) if grouped else rows:
        table.add_row(name, shape, *map(_quantity, numbers))
    table.add_section()
    totals = cost.macs, cost.macs_now, cost.macs_dense, cost.parameters
    table.add_row("total", "", *map(_quantity, totals), style="bold")
    console.print(table)
    console.print(f"The authors' counter: {cost.operations:,.0f} operations, {cost.parameters:,} parameters.")
    if grouped:
        console.print("[dim]Blocks of layers; `check` lists every layer.[/dim]")


def _by_block(rows: Sequence[tuple]) -> list[tuple]:
    """Rows added up over the part of the name that ends in its first number: `stages.0`, `layer1.1`."""
    blocks: dict[str, list] = {}
    for name, shape, *numbers in rows:
        match = re.match(r".*?\.\d+(?=\.)", name)
        block = blocks.setdefault(match[0] if match else name, [shape, *(0 for _ in numbers)])
        block[:] = [shape, *(total + number for total, number in zip(block[1:], numbers))]
    return [(name, *block) for name, block in blocks.items()]


def _quantity(number: float) -> str:
    """Three digits and a unit: 1234567 -> 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            digits = max(0, 3 - len(str(int(number / size))))
            return f"{number / size:.{digits}f} {unit}"
    return f"{number:.0f}"
