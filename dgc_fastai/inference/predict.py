"""Trained weights -> the network they belong to, and what it says about images."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from ..data.image_files import read_image
from ..models.checkpoints import load_checkpoint
from ..models.factory import build_model
from ..ops.device import select_channels_last, select_device
from ..recipe.loading import parse_recipe
from ..recipe.schema import Recipe
from ..utils.errors import CheckpointError
from .deploy import deploy

__all__ = ["Predictor"]


@dataclass(frozen=True)
class Predictor:
    """A trained network, and what it takes to classify image files with it.

    Attributes:
        model: the network, in evaluation mode.
        recipe: the recipe it was trained by.
        classes: names, in the order of its outputs.
    """

    model: nn.Module
    recipe: Recipe
    classes: list[str]

    @classmethod
    def from_weights(cls, path: str | Path) -> "Predictor":
        """The network of a run; its weights carry the recipe and the names of the classes.

        Args:
            path: a `.safetensors` file of a run, or a run folder, whose `best.safetensors` is taken.

        Raises:
            CheckpointError: the file is missing or damaged, or was not written by a run.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "best.safetensors"
        text, classes = _read_metadata(path)
        recipe = parse_recipe(text, str(path))
        model = load_checkpoint(build_model(recipe.model, len(classes), recipe.data.input_size), path)
        return cls(model.eval(), recipe, classes)

    def predict(self, images: Sequence[Path], batch_size: int = 64) -> Iterator[list[tuple[str, float]]]:
        """For each image file, the classes and their probabilities in [0, 1], the likeliest first.

        Raises:
            UserError: an image cannot be read.
        """
        device = select_device("auto")
        model = deploy(self.model.to(device))
        memory_format = torch.channels_last if select_channels_last(None, device) else torch.contiguous_format
        for start in range(0, len(images), batch_size):
            batch = torch.stack([read_image(path, self.recipe.data) for path in images[start : start + batch_size]])
            with torch.no_grad():
                probabilities = model(batch.to(device, memory_format=memory_format)).softmax(1).cpu()
            for row in probabilities:
                order = row.argsort(descending=True).tolist()
                yield [(self.classes[index], float(row[index])) for index in order]

    def metadata(self) -> dict[str, str]:
        """Class names and preprocessing as JSON, by name: what is needed to use the network elsewhere."""
        channels, height, width = self.recipe.data.input_size
        mean, std = self.recipe.data.statistics
        preprocessing = dict(channels=channels, height=height, width=width, scale=1 / 255, mean=mean, std=std)
        return {"classes": json.dumps(self.classes), "preprocessing": json.dumps(preprocessing)}


def _read_metadata(path: Path) -> tuple[str, list[str]]:
    """The recipe, as YAML, and the names of the classes that a run writes beside its weights."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        classes, recipe = json.loads(metadata["classes"]), metadata["recipe"]
        if not classes or not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("classes")
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else "not the weights of a run of app.py, or damaged"
        raise CheckpointError(f"{path}: cannot tell its network: {reason}") from None
    return recipe, classes
