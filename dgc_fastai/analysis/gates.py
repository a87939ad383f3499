"""A look at the gates of trained weights: numbers, a verdict and pictures."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import nn

from ..data.classes import class_names
from ..data.loaders import build_dataloaders
from ..inference.predict import Predictor
from ..layers.gate_schedule import dgc_layers
from ..models.factory import place
from ..models.gate_statistics import gate_statistics
from ..ops.device import select_device
from ..recipe.machine import check_data
from ..recipe.schema import Data
from ..utils.errors import RecipeError, UserError
from ..utils.files import write_atomically
from .gate_controls import gate_controls
from .gate_figures import draw_classes, draw_images, draw_layers, draw_map
from .gate_samples import sample_gates
from .gate_verdict import verdict

__all__ = ["look_at_gates"]


def look_at_gates(weights: Path, folder: Path, console: Console, data: Path | None = None) -> dict[str, Any]:
    """Run a network over the validation images of its recipe, and write `gates.json` and pictures.

    The images come in a fixed random order, so that the gates of another image are seldom those of its class.

    Args:
        weights: a `.safetensors` file of a run.
        folder: for the files; made if it is not there.
        console: where to show the progress.
        data: folder of the images; by default that of the recipe.

    Returns:
        The content of `gates.json`; docs/gates.md describes it.

    Raises:
        CheckpointError: the weights cannot be read, or were not written by a run.
        RecipeError: the data are not there, or are of other classes.
        UserError: the network has no DGC layers, or the folder cannot be made.
        WriteError: a file cannot be written.
    """
    predictor, images = _network_and_data(weights, data)
    recipe, classes = predictor.recipe, predictor.classes
    device = select_device("auto")
    model = place(predictor.model, device)
    loader = build_dataloaders(images, device, classes).valid
    loader = loader.new(shuffle=True, bs=max(2, loader.bs))  # one image has no other whose gates it could get

    def batches(what: str) -> Iterable:
        loader.set_epoch(seed=0, epoch=0)
        shown = console.is_terminal and not console.quiet
        return track(loader, what, len(loader), console=console, transient=True, disable=not shown)

    gates: dict[str, Any] = {
        "format": 1,
        "weights": str(weights),
        "recipe": recipe.name,
        "arch": recipe.model.arch,
        "data": "validation",
        **_statistics(model, batches("counting what the gates keep"), classes),
    }
    several = gates["images"] > 1
    gates["controls"] = gate_controls(model, batches("computing with other gates")) if several else None
    gates["verdict"] = verdict(gates)
    samples = sample_gates(model, batches("sampling"), images.statistics)
    of = f"{recipe.name}, {gates['images']:,} validation images"
    pictures = {
        "layers.png": draw_layers(gates, f"What each head keeps: {of}"),
        "classes.png": draw_classes(gates, f"How classes differ in what they keep: {of}"),
        "images.png": draw_images(samples, classes, f"Images that select most differently: {recipe.name}"),
        "map.png": draw_map(samples, classes, f"Images by what they select: {recipe.name}"),
    }
    _write(folder, gates, pictures)
    return gates


def _statistics(model: nn.Module, batches: Iterable, classes: list[str]) -> dict[str, Any]:
    try:
        return gate_statistics(model, batches, classes).to_dict()
    except ValueError as error:  # layers that do not see each image once
        raise UserError(f"what the gates of this network select cannot be counted: {error}") from None


def _network_and_data(weights: Path, path: Path | None) -> tuple[Predictor, Data]:
    predictor = Predictor.from_weights(weights)
    arch, data = predictor.recipe.model.arch, predictor.recipe.data
    if not dgc_layers(predictor.model):
        raise UserError(f"{weights}: {arch} has no DGC layers, and so no gates")
    if path is not None:
        if data.name == "digits":
            raise UserError("--data: the digits come with scikit-learn")
        data = data.model_copy(update={"path": str(path)})
    check_data(data)
    if class_names(data) != predictor.classes:
        raise RecipeError(f"data.path: {data.folder} has other classes than {weights} was trained for")
    return predictor, data


def _write(folder: Path, gates: dict[str, Any], pictures: dict[str, bytes | None]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the folder: {error.strerror}") from None
    for name, picture in pictures.items():
        if picture is not None:
            write_atomically(folder / name, picture)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier look
    write_atomically(folder / "gates.json", json.dumps(gates) + "\n")
