"""A recipe that converts a network -> the network before, and the recipe that starts from it."""

from pathlib import Path

import torch

from ..data.classes import class_names
from ..models.factory import create_unconverted
from ..models.weights import OtherClasses, load_weights, read_weights
from ..recipe.schema import Recipe, Train
from ..utils.errors import CheckpointError, RecipeError

__all__ = ["check_compression", "dense_network", "dense_recipe", "has_classifier", "starting_from"]

# What only a network with gates, or one with a teacher, has.
OF_GATES = ("teacher", "teacher_weight", "teacher_temperature", "lasso_weight")


def check_compression(recipe: Recipe) -> None:
    """Check that a recipe compresses a network.

    Raises:
        RecipeError: it converts none.
    """
    model = recipe.model
    if not model.convert:
        hint = f", and model.arch={model.arch}_dense" if model.has_gates else ""
        raise RecipeError(f"model.convert: there is nothing to compress without it; set it{hint}")


def dense_recipe(recipe: Recipe) -> Recipe:
    """The recipe that trains the same network without conversion: its name ends in `-before`."""
    defaults = {name: Train.model_fields[name].default for name in OF_GATES}
    update = {
        "name": f"{recipe.name[:93]}-before",
        "model": recipe.model.dense,
        "train": recipe.train.model_copy(update=defaults),
    }
    return recipe.model_copy(update=update)


def starting_from(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the weights of a run to start from."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": str(folder)})})


def has_classifier(recipe: Recipe) -> bool:
    """Whether `model.weights` are those of the whole network: of one that was trained for as many classes.

    Raises:
        CheckpointError: they cannot be read or fetched, do not fit, or are of a network with gates.
    """
    if not recipe.model.weights:
        return False
    try:
        dense_network(recipe)
    except OtherClasses:
        return False
    except CheckpointError:
        if recipe.model.weights != "auto":
            raise
        return False  # which starts from random weights then
    return True


def dense_network(recipe: Recipe) -> torch.nn.Module:
    """The network of `model.weights`, before it is converted, on the CPU.

    Raises:
        CheckpointError: as `has_classifier`; or they are of a network with other classes.
    """
    weights = read_weights(recipe.model, recipe.data.input_size[0])
    if weights.have_gates:
        raise CheckpointError(
            f"model.weights: {weights.source} is of a network with gates; compress starts from others"
        )
    network = create_unconverted(recipe.model, len(class_names(recipe.data)), recipe.data.input_size)
    if (source := load_weights(network, weights)) != weights.source:
        raise OtherClasses(f"model.weights: {source}")
    return network.eval()
