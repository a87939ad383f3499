"""The teacher of a recipe: the network of `train.teacher`."""

from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch

from ..inference.predict import Predictor
from ..models.checkpoints import read_tensors
from ..models.factory import checked_cost, create_unconverted
from ..models.weights import Weights, load_weights
from ..recipe.schema import Recipe
from ..utils.errors import CheckpointError, RecipeError

__all__ = ["load_teacher"]


def load_teacher(path: Path, recipe: Recipe, classes: Sequence[str]) -> torch.nn.Module:
    """The network of a weights file, to teach that of a recipe.

    Args:
        path: the weights of a run, or its folder: they tell their network; or any other weights that `model.weights`
            takes, of the recipe's network without its DGC layers.
        classes: names of the classes, in the order of the network's outputs.

    Raises:
        CheckpointError: the file cannot be read, or its network has other classes or channels, or
            takes no images of the recipe's size.
    """
    try:
        if path.is_dir():
            path /= "best.safetensors"
        if _is_of_a_run(path):
            network = _from_run(path, recipe, classes)
        else:
            network = create_unconverted(recipe.model.dense, len(classes), recipe.data.input_size)
            load_weights(network, Weights(read_tensors(path), str(path)), with_classifier=True)
        try:
            checked_cost(network, len(classes), recipe.data.input_size)
        except RecipeError as error:
            raise CheckpointError(f"{path}: {str(error).removeprefix('model: ')}") from None
        return network
    except CheckpointError as error:
        raise CheckpointError(f"train.teacher: {error}") from None


def _is_of_a_run(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return "recipe" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def _from_run(path: Path, recipe: Recipe, classes: Sequence[str]) -> torch.nn.Module:
    teacher = Predictor.from_weights(path)
    if teacher.classes != list(classes):
        theirs, ours = (", ".join(names[:3]) + ", ..." * (len(names) > 3) for names in (teacher.classes, list(classes)))
        raise CheckpointError(
            f"{path}: has {len(teacher.classes)} classes ({theirs}), and the data have {len(classes)} ({ours})"
        )
    channels, own = teacher.recipe.data.input_size[0], recipe.data.input_size[0]
    if channels != own:
        raise CheckpointError(f"{path}: its network takes images of {channels} channels, and these have {own}")
    return teacher.model
