"""Train Dynamic Group Convolution networks from recipes: `python app.py recipes/quickstart.yaml`."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

os.environ["DGC_FASTAI_RECIPE_ONLY"] = "1"  # no torch before the recipe is known to be good
from dgc_fastai.errors import CheckpointError, UserError  # noqa: E402
from dgc_fastai.preflight import check_data, check_device, preflight  # noqa: E402
from dgc_fastai.recipe import load_recipe  # noqa: E402

del os.environ["DGC_FASTAI_RECIPE_ONLY"]

app = App(
    name="app.py", help=__doc__, suppress_keyboard_interrupt=False, result_action="return_value", version_flags=()
)
console, errors = Console(), Console(stderr=True)
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)

RecipeFile = Annotated[Path, Parameter(help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[str, Parameter(help="section.key=value each, such as train.epochs=10.")]


@app.default
def train(recipe: RecipeFile, /, *overrides: Overrides) -> None:
    """Train RECIPE into a new run folder."""
    plan = load_recipe(recipe, overrides)
    preflight(plan)
    with console.status("Starting torch and fastai, reading the data"):
        from dgc_fastai.budget import budget
        from dgc_fastai.data import input_size
        from dgc_fastai.display import show_budget, show_recipe
        from dgc_fastai.learner import build_learner
        from dgc_fastai.run import train as run

        learn = build_learner(plan)
        cost = budget(learn.model, input_size(plan.data))
    show_recipe(console, plan)
    show_budget(console, cost)
    folder = run(learn, plan, console)
    console.print(f"The run is in {folder}.", soft_wrap=True, highlight=False)


@app.command
def check(recipe: RecipeFile, /, *overrides: Overrides) -> None:
    """Validate RECIPE, and print it and what its network costs."""
    plan = load_recipe(recipe, overrides)
    preflight(plan)
    with console.status("Starting torch and timm"):
        from dgc_fastai.budget import budget
        from dgc_fastai.data import input_size
        from dgc_fastai.display import show_budget, show_recipe
        from dgc_fastai.learner import build_model

        cost = budget(build_model(plan), input_size(plan.data))
    show_recipe(console, plan)
    show_budget(console, cost, every_layer=True)


@app.command
def evaluate(recipe: RecipeFile, /, *overrides: Overrides, weights: Path) -> None:
    """Print the loss, top-1 and top-5 of WEIGHTS on RECIPE's validation images.

    Parameters
    ----------
    weights
        A .safetensors of ours, or a .pth.tar of the authors' code.
    """
    plan = load_recipe(recipe, overrides)
    check_data(plan.data)
    check_device(plan)
    if not weights.is_file():
        raise CheckpointError(f"{weights}: cannot read the checkpoint: there is no such file")
    with console.status("Starting torch and fastai, reading the data"):
        from fastai.callback.progress import ProgressCallback

        from dgc_fastai.checkpoint import load_checkpoint
        from dgc_fastai.display import TrainingDisplay
        from dgc_fastai.learner import build_learner
        from dgc_fastai.learner import evaluate as measure

        learn = build_learner(plan)
        load_checkpoint(learn.model, weights)
    with learn.removed_cbs(learn._grab_cbs(ProgressCallback)), learn.added_cbs(TrainingDisplay(console)):
        result = measure(learn)
    top_1, top_5 = (f"{100 * result[name]:.2f} %" for name in ("top_1", "top_5"))
    console.print(f"top-1 {top_1}, top-5 {top_5}, loss {result['loss']:.4f}", highlight=False)


def main() -> int:
    """Run the command line; a mistake of the user's is one line and exit code 2."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        message = f"{error} Try app.py --help."
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        errors.print("interrupted; a run folder holds its last finished epoch", style="bold")
        return 130
    else:
        return 0
    errors.print("[bold red]error:[/] ", end="")
    errors.print(" ".join(message.split()), markup=False, highlight=False, soft_wrap=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
