"""Commands that use trained weights: evaluate, predict, export."""

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..utils.errors import UserError
from ..utils.invocation import program
from ..utils.launch import cores
from ..utils.text import one_line
from .app import USE, Overrides, RecipeFile, Weights, app, console, errors, load, results, weights_file

if TYPE_CHECKING:
    from ..inference.prediction_file import Prediction, PredictionFile

ImageSource = Annotated[
    Path,
    Parameter(allow_leading_hyphen=True, help="An image, a folder, a pattern in quotes, or - for stdin's list."),
]
MANY_IMAGES = 256  # whose decoding takes longer than starting processes for it


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
  {program()} predict best.safetensors 'photos/**/*.png' --top 1 --json
  ls *.jpg | {program()} predict best.safetensors - --out pets.csv
  {program()} predict best.safetensors photos --out 1.jsonl --shard 1/8""",
)
def predict(
    weights: Weights,
    image: ImageSource,
    /,
    *images: Annotated[Path, Parameter(help="More of them.")],
    top: Annotated[int, Parameter(validator=Number(gte=1), show_default=True)] = 3,
    out: Path | None = None,
    resume: bool = False,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    flip: bool = False,
    shard: Annotated[str | None, Parameter(help="Take part I of N only, such as 1/8.")] = None,
    batch_size: Annotated[int, Parameter(validator=Number(gte=1), show_default=True)] = 64,
    workers: Annotated[int | None, Parameter(validator=Number(gte=0, lte=256))] = None,
) -> None:
    """Print the most likely classes of each IMAGE, or write them to a file.

    Parameters
    ----------
    top
        Number of classes per image.
    out
        Write NAME.jsonl or NAME.csv instead, image by image.
    resume
        Continue that file if it is there.
    as_json
        Print JSON lines.
    flip
        Average over each image and its mirror image.
    batch_size
        Images that are computed together.
    workers
        Processes that read images; by default as many as the cores allow, for many images.
    """
    if resume and not out:
        raise UserError("--resume continues the file of --out; name it")
    weights = weights_file(weights)
    paths, asked = _images_of([image, *images], shard)
    if out:  # what is wrong with it is said before torch is imported, which takes seconds
        from ..inference.prediction_file import PredictionFile

        PredictionFile(out, top, resume)
    with errors.status("Starting torch and timm"):
        from ..inference.predict import Predictor

        predictor = Predictor.from_weights(weights)
    top = min(top, len(predictor.classes))
    if workers is None:
        workers = min(8, max(1, cores() - 1)) if len(paths) > MANY_IMAGES else 0

    def classify(paths: "Sequence[Path]", shows_progress: bool = True) -> "Iterator[Prediction]":
        found = predictor.predict_files(paths, top, batch_size, workers, flip)
        return _with_progress(found, len(paths)) if shows_progress and errors.is_terminal else found

    if not out:
        _print(classify(paths, not results.is_terminal), as_json, asked)
        return
    with PredictionFile(out, top, resume) as file:
        left = [path for path in paths if str(path) not in file.done]
        failed = _write(classify(left), file, batch_size)
    _tell(out, asked, len(left), len(paths) - len(left), failed)


def _images_of(sources: "Sequence[Path]", shard: str | None) -> tuple[list[Path], int]:
    """The images that are meant, or those of one part of them; and how many there are in all parts."""
    from ..inference.image_list import Shard, find_images, list_on_stdin

    part = Shard.parse(shard) if shard else None
    paths = list_on_stdin() if sources == [Path("-")] else find_images(sources)
    return [path for path in paths if part.has(path)] if part else paths, len(paths)


def _tell(out: Path, asked: int, written: int, there: int, failed: int) -> None:
    text = f"Wrote {written:,} of {asked:,} images to {out}."
    text += f" {there:,} were there already." if there else ""
    text += f" {failed:,} could not be classified; their lines say why." if failed else ""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    if failed and failed == written + there:
        raise UserError("none of the images can be classified")


def _with_progress(predictions: "Iterator[Prediction]", count: int) -> "Iterator[Prediction]":
    """Show how far it is; silent with --quiet."""
    columns = (
        TextColumn("classifying"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=errors, transient=True, disable=console.quiet) as progress:
        task = progress.add_task("", total=count, speed="")
        for done, prediction in enumerate(predictions, 1):
            yield prediction
            if done % 32 == 0 or done == count:  # an update costs as much as a small network on a GPU
                speed = progress.tasks[0].speed
                progress.update(task, completed=done, speed=f"{speed:,.0f}/s" if speed else "")


def _warn(prediction: "Prediction") -> None:
    name = os.fsencode(prediction.image).decode(errors="replace")
    text = f"{name}: {prediction.error}"
    errors.print("[yellow]warning:[/] ", end="")
    errors.print(one_line(text), markup=False, highlight=False, soft_wrap=True)


def _write(predictions: "Iterator[Prediction]", file: "PredictionFile", batch_size: int) -> int:
    """Write predictions batch by batch; return how many images could not be classified."""
    failed = 0
    while batch := list(islice(predictions, batch_size)):
        file.write(batch)
        for prediction in batch:
            if prediction.error is not None:
                failed += 1
                _warn(prediction)
    return failed


def _print(predictions: "Iterator[Prediction]", as_json: bool, asked: int) -> None:
    """Print predictions as they come.

    Raises:
        UserError: no image can be classified.
    """
    from ..inference.prediction_file import as_json as to_json

    count = readable = 0
    only_ascii = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    for prediction in predictions:
        path, classes, error = prediction
        count, readable = count + 1, readable + (error is None)
        if error is not None:
            if asked == 1:
                raise UserError(f"{path}: {error}")
            _warn(prediction)
        if as_json:
            print(to_json(prediction, only_ascii), flush=True)
        elif error is None:
            results.print(os.fsencode(path).decode(errors="replace"), soft_wrap=True, highlight=False, markup=False)
            line = "   ".join(f"[bold]{escape(name)}[/] {100 * probability:.2f} %" for name, probability in classes)
            results.print(Padding(Text.from_markup(line), (0, 0, 0, 4), expand=False), highlight=False)
    if count and not readable:
        raise UserError(f"none of the {count:,} images can be classified")


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
