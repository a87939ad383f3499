"""The command that looks inside: gates."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..utils.invocation import display_path, program
from .app import MEASURE, Weights, app, console, errors, results, weights_file


@app.command(
    group=MEASURE,
    help_epilogue=f"""\
Examples:
  {program()} gates runs/quickstart-20260101-120000
  {program()} gates best.safetensors --data ~/pictures --out look""",
)
def gates(
    weights: Weights,
    /,
    *,
    data: Annotated[Path | None, Parameter(help="Folder of the images, if it is not where it was in training.")] = None,
    out: Annotated[
        Path | None,
        Parameter(help="Folder for gates.json and the pictures; by default the folder gates beside the weights."),
    ] = None,
) -> None:
    """Print what the gates of WEIGHTS select by, and draw it.

    The network runs over the validation images of its recipe.
    """
    weights = weights_file(weights)
    folder = out or weights.parent / "gates"
    with console.status("Starting torch and fastai, reading the data"):
        from ..analysis.gates import look_at_gates
    found = look_at_gates(weights, folder, console if console.quiet else errors, data)
    for line in found["verdict"]:
        results.print(line, highlight=False, markup=False)
    text = f"gates.json and the pictures are in {display_path(folder)}."
    results.print(text, soft_wrap=True, highlight=False, markup=False)
