"""Trained weights -> the network they belong to, and what it says about images."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.image_files import ImageReader, UnreadableImage
from ..models.checkpoints import load_checkpoint
from ..models.factory import build_model
from ..ops.device import select_channels_last, select_device
from ..recipe.loading import parse_recipe
from ..recipe.schema import Recipe
from ..utils.errors import CheckpointError, UserError, dead_reader
from .deploy import deploy
from .prediction_file import Prediction

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

    @cached_property
    def deployed(self) -> nn.Module:
        """The network, deployed, on the first GPU if there is one; made when first used."""
        return deploy(self.model.to(select_device("auto")))

    def predict(self, images: Sequence[Path], batch_size: int = 64) -> Iterator[list[tuple[str, float]]]:
        """For each image file, the classes and their probabilities in [0, 1], the likeliest first.

        Raises:
            UserError: there are none for an image; see `predict_files`.
        """
        for prediction in self.predict_files(images, len(self.classes), batch_size):
            if prediction.error is not None:
                raise UserError(f"{prediction.image}: {prediction.error}")
            yield prediction.classes

    def predict_files(
        self, images: Sequence[Path], top: int, batch_size: int = 64, workers: int = 0, flip: bool = False
    ) -> Iterator[Prediction]:
        """Classify any number of image files, in their order, on the first GPU if there is one.

        Images that cannot be read, or for which the network's output is NaN or Inf, come with that as their error.

        Args:
            top: classes for each image, the likeliest.
            workers: processes that read the files; 0 for this one.
            flip: average the probabilities of each image and its mirror image.

        Raises:
            UserError: a process that reads the files has died.
        """
        device, model = select_device("auto"), self.deployed
        memory_format = torch.channels_last if select_channels_last(None, device) else torch.contiguous_format
        reader = ImageReader(self.recipe.data)
        loader = DataLoader(
            _Files(images, reader),
            batch_size,
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )

        @torch.inference_mode()
        def classify(batch: Tensor) -> tuple[Tensor, Tensor]:
            batch = reader.normalize(batch.to(device, non_blocking=True)).contiguous(memory_format=memory_format)
            shares = model(batch).softmax(1)
            if flip:
                shares = (shares + model(batch.flip(3)).softmax(1)) / 2
            return shares.topk(min(top, len(self.classes)))

        waiting: tuple[list[Path], list[str | None], tuple[Tensor, Tensor] | None] | None = None
        start = 0
        for batch, errors in _read(loader):
            found = None if batch is None else classify(batch)
            if waiting:  # a GPU computes the next batch meanwhile
                yield from self._named(*waiting)
            waiting = list(images[start : start + len(errors)]), errors, found
            start += len(errors)
        if waiting:
            yield from self._named(*waiting)

    def _named(
        self, images: list[Path], errors: list[str | None], found: tuple[Tensor, Tensor] | None
    ) -> Iterator[Prediction]:
        rows = iter(zip(*(part.tolist() for part in found)) if found else ())
        for image, error in zip(images, errors):
            shares, indices = next(rows) if error is None else ((), ())
            if any(map(math.isnan, shares)):
                shares, error = (), "the network's output is NaN or Inf"
            yield Prediction(image, [(self.classes[index], share) for index, share in zip(indices, shares)], error)

    def metadata(self) -> dict[str, str]:
        """Class names and preprocessing as JSON, by name: what is needed to use the network elsewhere."""
        channels, height, width = self.recipe.data.input_size
        mean, std = self.recipe.data.statistics
        preprocessing = dict(channels=channels, height=height, width=width, scale=1 / 255, mean=mean, std=std)
        return {"classes": json.dumps(self.classes), "preprocessing": json.dumps(preprocessing)}


class _Files(Dataset):
    """Image files by number: the image, or why it cannot be read."""

    def __init__(self, images: Sequence[Path], reader: ImageReader):
        self.images, self.reader = images, reader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.reader(self.images[index]).as_subclass(Tensor)
        except UnreadableImage as error:
            return f"cannot read the image: {error.args[1]}"


def _collate(items: Sequence[Tensor | str]) -> tuple[Tensor | None, list[str | None]]:
    """The images of a batch that can be read, and for each of its files an error or None."""
    images = [item for item in items if isinstance(item, Tensor)]
    errors = [None if isinstance(item, Tensor) else item for item in items]
    return torch.stack(images) if images else None, errors


def _read(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader; one clear line where a process of its has died."""
    try:
        yield from loader
    except RuntimeError as error:
        if not (death := dead_reader(error)):
            raise
        raise UserError(f"{death}; try fewer --workers, or a smaller --batch-size") from None


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
