"""Trained weights -> the network they belong to, what it says about images, and what others can load."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..data.loaders import input_size, read_image, statistics
from ..models.checkpoints import load_checkpoint
from ..models.factory import build_model
from ..ops.device import select_device
from ..recipe.loading import parse_recipe
from ..recipe.schema import Recipe
from ..utils.errors import CheckpointError
from .deploy import deploy

__all__ = ["Trained", "load_trained", "predict"]


@dataclass
class Trained:
    """A network in evaluation mode, the recipe it was trained by, and its classes in the order of its outputs."""

    model: torch.nn.Module
    recipe: Recipe
    classes: list[str]

    def metadata(self) -> dict[str, str]:
        """What one needs to use the network elsewhere, as JSON by name."""
        channels, height, width = input_size(self.recipe.data)
        mean, std = statistics(self.recipe.data)
        preprocessing = dict(channels=channels, height=height, width=width, scale=1 / 255, mean=mean, std=std)
        return {"classes": json.dumps(self.classes), "preprocessing": json.dumps(preprocessing)}


def load_trained(path: Path) -> Trained:
    """The network of a run's weights; the file itself says which.

    Raises:
        CheckpointError: the file is missing or damaged, or was not written by a run.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        classes, text = json.loads(metadata["classes"]), metadata["recipe"]
        if not classes or not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("classes")
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else "not the weights of a run of app.py, or damaged"
        raise CheckpointError(f"{path}: cannot tell its network: {reason}") from None
    recipe = parse_recipe(text, str(path))
    model = load_checkpoint(build_model(recipe, len(classes)), path)
    return Trained(model.eval(), recipe, classes)


def predict(trained: Trained, images: Sequence[Path], batch_size: int = 64) -> Iterator[list[tuple[str, float]]]:
    """For each image its classes and their probabilities, the likeliest first.

    Raises:
        UserError: an image cannot be read.
    """
    device = select_device("auto")
    model = deploy(trained.model.to(device))
    for start in range(0, len(images), batch_size):
        batch = torch.stack([read_image(path, trained.recipe.data) for path in images[start : start + batch_size]])
        with torch.no_grad():
            probabilities = model(batch.to(device)).softmax(1).cpu()
        for row in probabilities:
            order = row.argsort(descending=True).tolist()
            yield [(trained.classes[number], float(row[number])) for number in order]
