"""Commands to start with: list, copy, check."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..utils.invocation import display_path, program
from .app import START, Overrides, RecipeFile, app, console, load, results


@app.command(name="list", group=START, help_epilogue=f"Example:\n  {program()} list")
def list_recipes(
    folder: Annotated[Path | None, Parameter(help="A folder of recipes; by default those of this package.")] = None,
    /,
) -> None:
    """List the recipes: data, need of a GPU, time, target accuracy."""
    from ..recipe.catalogue import describe_recipes, recipes_folder

    described = describe_recipes(folder or recipes_folder())
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("recipe", no_wrap=True, style="bold")
    table.add_column("data", no_wrap=True)
    for heading in ("GPU needed", "time", "target (published)"):
        table.add_column(heading)
    for one in described:
        table.add_row(*map(escape, (one.path.stem, one.data, one.gpu, one.time, one.target)))
    results.print(table)
    name = display_path(described[0].path) if folder else described[0].path.stem
    console.print(f"\nTo train one: {program()} {name}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"To edit one:  {program()} copy {name}", soft_wrap=True, highlight=False, markup=False)


@app.command(
    group=START, help_epilogue=f"Example:\n  {program()} copy pictures_resnet18 pets.yaml   then edit pets.yaml"
)
def copy(
    recipe: RecipeFile,
    to: Annotated[Path | None, Parameter(help="The name of the copy; by default my_RECIPE.yaml.")] = None,
    /,
) -> None:
    """Copy RECIPE into a file of your own to edit."""
    from ..recipe.copying import copy_recipe

    path = copy_recipe(recipe, to)
    text = f"Wrote {path}. Edit it, then train it: {program()} {path}"
    results.print(text, soft_wrap=True, highlight=False, markup=False)


@app.command(
    group=START,
    help_epilogue=f"Examples:\n  {program()} check quickstart\n"
    f"  {program()} check imagenet_r18 data.path=~/imagenet --layers",
)
def check(recipe: RecipeFile, /, *overrides: Overrides, layers: bool = False) -> None:
    """Check RECIPE, its data and its device; print what its network costs.

    Parameters
    ----------
    layers
        Print the cost of every layer, too.
    """
    plan = load(recipe, overrides)
    from ..recipe.machine import check_machine

    check_machine(plan)
    with console.status("Starting torch and timm"):
        from ..data.classes import class_names
        from ..models.factory import network_cost
        from .tables import show_cost, show_layers, show_recipe, show_verdict

        cost = network_cost(plan.model, len(class_names(plan.data)), plan.data.input_size)
    show_verdict(results, cost)
    show_cost(results, cost)
    if layers:
        show_layers(results, cost)
    show_recipe(console, plan)
