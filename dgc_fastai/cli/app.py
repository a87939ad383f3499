"""The command line's application: its groups of commands, its consoles, and the parameters that commands share.

Commands import what they run when they run: help and errors in the command line are to be immediate.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter
from rich.console import Console

from .. import __version__
from ..utils import launch
from ..utils.errors import CheckpointError
from ..utils.invocation import program

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..recipe.schema import Recipe

__all__ = ["app", "console", "errors", "results"]

# `console` shows progress and is silent with --quiet; `results` shows what was asked for. Of several processes only the
# main one prints on them. Errors come from the process that met them.
console, results, errors = Console(), Console(), Console(stderr=True)
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)

START, TRAIN, USE, MEASURE = (
    Group(name, sort_key=key) for key, name in enumerate(("Start", "Train", "Use", "Measure"))
)
OPTIONS = Group("Options", sort_key=9)

app = App(
    name=program(),
    help="Train, use and measure networks with Dynamic Group Convolution (ECCV 2020).",
    usage=f"Usage: {program()} COMMAND ...\n       {program()} RECIPE [section.key=value ...]\n",
    help_format="plaintext",
    help_epilogue=f"""\
Examples:
  {program()} quickstart                  train a small network, in a minute
  {program()} copy quickstart mine.yaml   make a recipe of your own
  {program()} check mine.yaml             is all there? what does it cost?
  {program()} train mine.yaml train.epochs=30
  {program()} predict runs/mine-20260101-120000 digit.png
`{program()} COMMAND --help` explains a command. Without one, RECIPE is trained.""",
    version=__version__,
    default_parameter=Parameter(show_default=False, negative=""),
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app["--help"].group = app["--version"].group = (OPTIONS,)

RecipeFile = Annotated[Path, Parameter(help="A YAML file, or the name of a recipe in the list, such as quickstart.")]
Overrides = Annotated[str, Parameter(help="section.key=value, such as train.epochs=10.")]
Weights = Annotated[Path, Parameter(help="A run folder, for its best.safetensors, or a .safetensors file.")]


def set_quiet(quiet: bool) -> None:
    """Silence progress, or not; of several processes all but the main one print nothing at all."""
    results.quiet = not launch.is_main_process()
    console.quiet = quiet or results.quiet


def load(recipe: Path, overrides: "Iterable[str]") -> "Recipe":
    """Load a recipe with overrides, and print what it leaves to the data.

    A command imports neither pydantic nor YAML before.
    """
    from ..recipe.loading import load_recipe

    notes: list[str] = []
    plan = load_recipe(recipe, overrides, notes)
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    return plan


def weights_file(path: Path) -> Path:
    """The weights that a command is given: a file, or the best ones of a run folder.

    Raises:
        CheckpointError: there is no such file.
    """
    if (path / "recipe.yaml").is_file() and not (path / "best.safetensors").is_file():
        raise CheckpointError(f"{path}: this run has no best.safetensors yet; it has not finished an epoch")
    file = path / "best.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: cannot read the weights: there is no such file")
    return file
