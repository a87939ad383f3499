"""Train Dynamic Group Convolution networks from recipes: `python app.py recipes/quickstart.yaml`."""

import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, Optional

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import track
from rich.table import Table

from ..analysis.compare import show_comparison
from ..recipe.catalogue import copy_recipe, describe_recipes
from ..recipe.loading import load_recipe
from ..recipe.machine import check_compiler, check_data, check_device, check_processes, check_machine
from ..utils import launch
from ..utils.errors import CheckpointError, Interrupted, LostProcess, UserError

app = App(
    name="app.py", help=__doc__, suppress_keyboard_interrupt=False, result_action="return_value", version_flags=()
)
# Of several processes, the first prints; an error comes from the one that has met it.
console, errors = Console(quiet=not launch.is_main_process()), Console(stderr=True)
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)

RecipeFile = Annotated[Path, Parameter(help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[str, Parameter(help="section.key=value each, such as train.epochs=10.")]
Weights = Annotated[Path, Parameter(help="A run folder, or a .safetensors of one.")]


@app.default
def train(
    recipe: RecipeFile, /, *overrides: Overrides, resume: Annotated[bool, Parameter(negative="")] = False
) -> None:
    """Train RECIPE into a new run folder.

    Parameters
    ----------
    resume
        Go on with the newest interrupted run of this recipe, if there is one.
    """
    plan = load_recipe(recipe, overrides)
    check_machine(plan)
    with console.status("Starting torch and fastai, reading the data"):
        from ..training.distributed import leave
        from ..training.run import TrainingRun
        from ..training.run_folder import run_to_go_on_with
        from .tables import show_budget, show_recipe

        run = TrainingRun(plan)
        run.learner  # reads the data
    show_recipe(console, plan)
    show_budget(console, run.cost)
    folder, found = run_to_go_on_with(plan, resume)
    if found:
        console.print(found, soft_wrap=True, highlight=False)
    folder = run.fit(console, folder)
    leave()
    console.print(f"The run is in {folder}.", soft_wrap=True, highlight=False)


@app.command
def check(recipe: RecipeFile, /, *overrides: Overrides) -> None:
    """Validate RECIPE, and print it and what its network costs."""
    plan = load_recipe(recipe, overrides)
    check_machine(plan)
    with console.status("Starting torch and timm"):
        from ..data.loaders import class_names
        from ..models.factory import network_cost
        from .tables import show_budget, show_recipe

        cost = network_cost(plan.model, len(class_names(plan.data)), plan.data.input_size)
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
    check_processes(plan)
    check_device(plan)
    if not weights.is_file():
        raise CheckpointError(f"{weights}: cannot read the checkpoint: there is no such file")
    with console.status("Starting torch and fastai, reading the data"):
        from ..training.distributed import leave
        from ..training.run import TrainingRun

        run = TrainingRun(plan)
        run.load(weights)
    result = run.evaluate(console)
    leave()
    top_1, top_5 = (f"{100 * result[name]:.2f} %" for name in ("top_1", "top_5"))
    console.print(f"top-1 {top_1}, top-5 {top_5}, loss {result['loss']:.4f}", highlight=False)


@app.command
def predict(
    weights: Weights,
    image: Annotated[Path, Parameter(help="An image file.")],
    /,
    *images: Annotated[Path, Parameter(help="More image files.")],
    top: Annotated[int, Parameter(validator=Number(gte=1))] = 3,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Print the likeliest classes of each IMAGE, by WEIGHTS.

    Parameters
    ----------
    top
        How many classes of each image.
    as_json
        Print JSON.
    """
    images = image, *images
    with errors.status("Starting torch and timm"):
        from ..inference.predict import Predictor

        predictor = Predictor.from_weights(weights)
    found = predictor.predict(images)
    if errors.is_terminal:
        found = track(found, "classifying", len(images), console=errors, transient=True)
    found = list(found)
    if as_json:
        answers = [
            {"image": str(path), "predictions": [{"class": name, "probability": p} for name, p in classes[:top]]}
            for path, classes in zip(images, found)
        ]
        print(json.dumps(answers, indent=2, ensure_ascii=False))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    for number in range(min(top, len(predictor.classes))):
        table.add_column(f"{number + 1}", overflow="fold")
    for path, classes in zip(images, found):
        table.add_row(
            escape(str(path)), *(f"{escape(name)} [dim]{100 * share:.2f} %[/]" for name, share in classes[:top])
        )
    console.print(table)


@app.command
def export(weights: Weights, out: Annotated[Path, Parameter(help="NAME.pt2 or NAME.onnx.")], /) -> None:
    """Write the network of WEIGHTS for torch.export or ONNX, and verify it against the original."""
    with console.status("Exporting"):
        from ..inference.export import export as write
        from ..inference.predict import Predictor

        difference = write(Predictor.from_weights(weights), out)
    console.print(f"Wrote {out}; its outputs equal the network's to {difference:.0e}.", soft_wrap=True, highlight=False)


@app.command
def compare(
    run: Annotated[Path, Parameter(help="A run folder.")], /, *runs: Annotated[Path, Parameter(help="More of them.")]
) -> None:
    """Print a table of runs: accuracy, budget, time, and where their recipes differ."""
    show_comparison(console, [run, *runs])


@app.command
def sweep(recipe: RecipeFile, /, *overrides: Overrides) -> None:
    """Train RECIPE with every combination of values, such as model.gate_factor=0.25,0.5,1."""
    load_recipe(recipe)
    with console.status("Starting torch and fastai, trying every combination"):
        from ..training.sweep import plan_sweep
        from ..training.sweep import sweep as run_all

        folder, plans = plan_sweep(recipe, overrides)
    show_comparison(console, run_all(folder, plans, console))
    console.print(f"The runs, sweep.csv and sweep.png are in {folder}.", soft_wrap=True, highlight=False)


@app.command
def benchmark(
    recipe: RecipeFile,
    /,
    *overrides: Overrides,
    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 7,
    out: Optional[Path] = None,
    compile: bool = True,
    only: Optional[Literal["training", "inference", "data"]] = None,
) -> None:
    """Time RECIPE's network beside its twins without gates and the authors' formulation; or its data pipeline.

    Parameters
    ----------
    rounds
        How often each is measured, in turn.
    out
        The folder for benchmark.json and benchmark.png; by default a new one below the recipe's output.
    compile
        Whether to try inference by torch.compile, too, which takes it some minutes and needs a C++ compiler.
    only
        What is wanted of it; by default training and inference, which do without the data. data: the images a second
        that the pipeline gives, by itself, beside those that a training step takes.
    """
    plan = load_recipe(recipe, overrides)
    check_device(plan)
    check_compiler(plan.train.compile, "train.compile")
    check_compiler(compile and only in (None, "inference"), "--compile")
    if only == "data":
        check_data(plan.data)
    with console.status("Starting torch and timm, building the networks"):
        from ..analysis.benchmark import benchmark as measure
        from ..analysis.benchmark import benchmark_folder, plan_benchmark, plan_data
        from ..analysis.benchmark_report import show_benchmark

        if only == "data":
            measurements, sources = [], plan_data(plan)
        else:
            measurements = [one for one in plan_benchmark(plan, compile) if one.what.startswith(only or "")]
            sources = []
        folder = benchmark_folder(plan, out)
    show_benchmark(console, measure(plan, measurements, folder, rounds, console, sources))
    console.print(f"benchmark.json and benchmark.png are in {folder}.", soft_wrap=True, highlight=False)


@app.command(name="list")
def list_recipes(folder: Path = Path(__file__).parents[2] / "recipes", /) -> None:
    """List the recipes in FOLDER, and what each reproduces."""
    for path, title, reproduces in describe_recipes(folder):
        path = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path
        console.print(f"[bold]{escape(str(path))}[/]", highlight=False)
        console.print(
            Padding(f"{escape(title)}\n[dim]Reproduces[/] {escape(reproduces)}", (0, 0, 1, 4)), highlight=False
        )


@app.command(name="copy")
def copy(recipe: RecipeFile, to: Annotated[Optional[Path], Parameter(help="By default my_RECIPE.")] = None, /) -> None:
    """Copy RECIPE to one of your own to edit."""
    path = copy_recipe(recipe, to)
    console.print(f"Wrote {path}; edit it, then: python app.py {path}", soft_wrap=True, highlight=False)


def main() -> int:
    """Run the command line; a mistake of the user's is one line and exit code 2."""
    try:
        command, arguments, _ = app.parse_args(sys.argv[1:], exit_on_error=False, print_error=False)
        if launch.world_size() > 1 and command not in (train, evaluate):
            raise UserError(f"{command.__name__} takes one process, and {launch.world_size()} were started")
        command(*arguments.args, **arguments.kwargs)
        sys.stdout.flush()
    except CycloptsError as error:
        code, message = 2, f"{error} Try app.py --help."
    except UserError as error:
        code, message = 2, str(error)
    except LostProcess as error:
        code, message = 1, str(error)
    except BrokenPipeError:  # nobody reads on
        return 1
    except OSError as error:  # from where the text goes, or from what other packages write
        code, message = 2, f"cannot go on: {error}"
    except Interrupted as stop:
        message, signal = stop.args
        if launch.is_main_process():
            errors.print(message, style="bold", highlight=False, markup=False, soft_wrap=True)
        return 128 + signal
    except KeyboardInterrupt:
        errors.print("interrupted", style="bold")
        return 130
    else:
        return 0
    if _speaks():
        errors.print("[bold red]error:[/] ", end="")
        errors.print(" ".join(message.split()), markup=False, highlight=False, soft_wrap=True)
    return code


def _speaks() -> bool:
    """Whether this process is the one, of several, that tells what has stopped them."""
    distributed = sys.modules.get("dgc_fastai.training.distributed")  # not there before torch is
    return distributed.speaks() if distributed else launch.local_rank() == 0


def run() -> None:
    """The entry point: run the command line and leave with its exit code."""
    code = main()
    with suppress(OSError):  # what could not be printed is not tried once more
        sys.stdout.close()
    sys.exit(code)
