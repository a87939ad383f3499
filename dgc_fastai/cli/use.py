"""Commands that use trained weights: evaluate, predict, export."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape
from rich.padding import Padding
from rich.progress import track
from rich.text import Text

from ..utils.errors import UserError
from ..utils.invocation import program
from .app import USE, Overrides, RecipeFile, Weights, app, console, errors, load, results, weights_file


@app.command(
    group=USE,
    help_epilogue=f"""\
Examples:
  {program()} evaluate quickstart --weights runs/quickstart-20260101-120000
  {program()} evaluate imagenet_r18 data.path=~/imagenet --weights imagenet_dyresnet18_h4.tar""",
)
def evaluate(recipe: RecipeFile, /, *overrides: Overrides, weights: Path) -> None:
    """Print accuracy and loss of WEIGHTS on RECIPE's validation images.

    Parameters
    ----------
    weights
        A run folder, a .safetensors file of one, or a .pth.tar of the authors' code.
    """
    plan = load(recipe, overrides)
    from ..recipe.machine import check_data, check_device, check_distributed

    check_data(plan.data)
    check_distributed(plan)
    check_device(plan)
    weights = weights_file(weights)
    with console.status("Starting torch and fastai, reading the data"):
        from ..training.collectives import destroy_process_group
        from ..training.run import TrainingRun

        run = TrainingRun(plan)
        run.load(weights)
    result = run.evaluate(console)
    destroy_process_group()
    top_1, top_5 = (f"{100 * result[name]:.2f} %" for name in ("top_1", "top_5"))
    results.print(f"top-1 {top_1}, top-5 {top_5}, loss {result['loss']:.4f}", highlight=False)


@app.command(
    group=USE,
    help_epilogue=f"""\
Examples:
  {program()} predict runs/pets-20260101-120000 cat.jpg dog.jpg
  {program()} predict best.safetensors *.jpg --top 1 --json""",
)
def predict(
    weights: Weights,
    image: Annotated[Path, Parameter(help="An image file.")],
    /,
    *images: Annotated[Path, Parameter(help="More image files.")],
    top: Annotated[int, Parameter(validator=Number(gte=1), show_default=True)] = 3,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Print the most likely classes of each IMAGE.

    Parameters
    ----------
    top
        Number of classes per image.
    as_json
        Print JSON.
    """
    paths = image, *images
    weights = weights_file(weights)
    _check_images(paths)
    with errors.status("Starting torch and timm"):
        from ..inference.predict import Predictor

        predictor = Predictor.from_weights(weights)
    predictions: Iterable[list[tuple[str, float]]] = predictor.predict(paths)
    if errors.is_terminal and not console.quiet:
        predictions = track(predictions, "classifying", len(paths), console=errors, transient=True)
    found = [classes[:top] for classes in predictions]
    if as_json:
        answers = [
            {"image": str(path), "predictions": [{"class": name, "probability": p} for name, p in classes]}
            for path, classes in zip(paths, found)
        ]
        print(json.dumps(answers, indent=2, ensure_ascii=False))
        return
    for path, classes in zip(paths, found):
        results.print(str(path), soft_wrap=True, highlight=False, markup=False)
        line = "   ".join(f"[bold]{escape(name)}[/] {100 * probability:.2f} %" for name, probability in classes)
        results.print(Padding(Text.from_markup(line), (0, 0, 0, 4), expand=False), highlight=False)


@app.command(
    group=USE,
    help_epilogue=f"Examples:\n  {program()} export runs/pets-20260101-120000 pets.onnx\n"
    f"  {program()} export best.safetensors pets.pt2",
)
def export(weights: Weights, out: Annotated[Path, Parameter(help="NAME.pt2 or NAME.onnx.")], /) -> None:
    """Write the network of WEIGHTS as torch.export or ONNX, and verify it."""
    weights = weights_file(weights)
    with console.status("Exporting"):
        from ..inference.export import export as write
        from ..inference.predict import Predictor

        difference = write(Predictor.from_weights(weights), out)
    text = f"Wrote {out}. Its outputs differ from the network's by {difference:.0e} at most."
    results.print(text, soft_wrap=True, highlight=False, markup=False)


def _check_images(paths: Sequence[Path]) -> None:
    """Refuse missing files before torch is imported, which takes seconds.

    Raises:
        UserError: an image file is missing.
    """
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: cannot read the image: it is a folder; name its files, such as {path}/*.jpg")
        if not path.exists():
            raise UserError(f"{path}: cannot read the image: No such file or directory")
