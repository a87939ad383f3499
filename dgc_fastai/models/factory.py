"""A recipe's network: its cost, and itself."""

from typing import Optional

import timm
import timm.optim
import torch

from .. import models  # noqa: F401  (registers the networks)
from ..data.loaders import class_names, input_size
from ..recipe.schema import Recipe
from ..utils.errors import RecipeError
from .cost import Budget, budget

MOST_PARAMETERS = 2 * 10**9


def network_cost(recipe: Recipe, classes: Optional[int] = None) -> Budget:
    """What the recipe's network costs, without any memory being spent on it.

    Args:
        classes: how many; by default the data is asked.

    Raises:
        RecipeError: the network's keywords do not go together, or with the size of the images.
    """
    classes = classes or len(class_names(recipe.data))
    try:
        with torch.device("meta"):
            cost = budget(_create(recipe, classes), input_size(recipe.data))
        if cost.parameters > MOST_PARAMETERS:
            raise ValueError(f"{cost.parameters:,} parameters; {MOST_PARAMETERS:,} is the most that is tried")
        return cost
    except ValueError as error:
        raise RecipeError(f"model: {error}") from None


def build_model(recipe: Recipe, classes: Optional[int] = None) -> torch.nn.Module:
    """The recipe's network with fresh weights, sized for its data.

    Args, Raises: as `network_cost`, which is asked first.
    """
    classes = classes or len(class_names(recipe.data))
    network_cost(recipe, classes)
    return _create(recipe, classes)


def _create(recipe: Recipe, classes: int) -> torch.nn.Module:
    channels = input_size(recipe.data)[0]
    return timm.create_model(recipe.model.arch, num_classes=classes, in_chans=channels, **recipe.model.keywords())


def prepare(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.nn.Module:
    """The network on its device, in the recipe's memory format and compiled if the recipe says so."""
    model = model.to(device)
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.train.compile:
        model.compile()
    return model
