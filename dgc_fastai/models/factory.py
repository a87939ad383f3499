"""The model section of a recipe -> a network, and its cost."""

from copy import deepcopy
from typing import Any

import timm
import torch

from .. import models  # noqa: F401  (registers the networks)
from ..ops.device import select_channels_last
from ..recipe.conversion import Convert
from ..recipe.schema import Model, Train
from ..utils.errors import RecipeError
from ..utils.text import did_you_mean
from .allocation import Options, mac_budget, mac_options, one_gate_factor
from .conversion import convert
from .cost import Budget, budget

MAX_PARAMETERS = 2 * 10**9

InputSize = tuple[int, int, int]


def network_cost(model: Model, classes: int, input_size: InputSize) -> Budget:
    """The cost of a network, computed without allocating its weights.

    Args:
        classes: number of classes.
        input_size: channels, height and width of an image.

    Raises:
        RecipeError: there is no such network, its keywords do not go together, or do not fit the size of the images;
            or it has nothing to convert.
    """
    with torch.device("meta"):
        network = create_model(model, classes, input_size)
    return checked_cost(network, classes, input_size)


def checked_cost(network: torch.nn.Module, classes: int, input_size: InputSize) -> Budget:
    """The cost of a network that exists.

    Raises:
        RecipeError: it cannot take images of this size, has other classes, or is too large to try.
    """
    try:
        cost = budget(network, input_size)
        if cost.output != (classes,):
            raise ValueError(f"the output for an image is {cost.output or 'no tensor'}, not one of {classes} classes")
        if cost.parameters > MAX_PARAMETERS:
            raise ValueError(f"{cost.parameters:,} parameters; {MAX_PARAMETERS:,} is the most that is tried")
        return cost
    except ValueError as error:
        raise RecipeError(f"model: {error}") from None


def build_model(model: Model, classes: int, input_size: InputSize) -> torch.nn.Module:
    """A network with fresh weights. Its cost is checked first, so that a slip in a recipe does not fill the memory.

    Args, Raises: as `network_cost`.
    """
    network_cost(model, classes, input_size)
    return create_model(model, classes, input_size)


def create_model(model: Model, classes: int, input_size: InputSize) -> torch.nn.Module:
    """`build_model` for a caller that has checked `network_cost` already."""
    return convert_model(create_unconverted(model, classes, input_size), model, input_size)


def create_unconverted(model: Model, classes: int, input_size: InputSize) -> torch.nn.Module:
    """The network of `create_model` before `model.convert`."""
    sizes: dict[str, Any] = {"num_classes": classes, "in_chans": input_size[0]}
    if not model.is_foreign:
        try:
            return timm.create_model(model.arch, **sizes, **model.keywords())
        except ValueError as error:
            raise RecipeError(f"model: {error}") from None
    if not timm.is_model(model.arch):
        raise RecipeError(f"model.arch: no network {model.arch!r}{did_you_mean(model.arch, timm.list_models())}")
    try:
        return timm.create_model(model.arch, **sizes, **model.keywords())
    except Exception as error:  # each of timm's families raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"model.arch: timm cannot make {model.arch}: {reason}") from None


def convert_model(network: torch.nn.Module, model: Model, input_size: InputSize) -> torch.nn.Module:
    """Give a network the DGC layers that `model.convert` describes, if there is one; in place.

    A target that gate factors have not been chosen for yet is met by one for all layers; one in milliseconds is not.

    Raises:
        RecipeError: there is nothing to convert, or the target is out of reach.
    """
    if not model.convert:
        return network
    try:
        keywords = model.convert.keywords()
        if model.convert.target and model.convert.has_to_choose:
            options, cost = conversion_options(network, model.convert, input_size)
            keywords["gate_factor"] = one_gate_factor(options, mac_budget(options, cost, model.convert.target))
        return convert(network, **keywords, input_size=input_size)
    except ValueError as error:
        raise RecipeError(f"model.convert: {error}") from None


def conversion_options(
    network: torch.nn.Module, settings: Convert, input_size: InputSize
) -> tuple[list[Options], Budget]:
    """What the layers may keep that `convert` would give a network, and what that network costs, in MACs.

    Args:
        network: before conversion. It is not changed.

    Raises:
        ValueError: there is nothing to convert.
    """
    converted = convert(deepcopy(network).to("meta"), **settings.keywords(), input_size=input_size)
    cost = budget(converted, input_size)
    return mac_options(converted, cost), cost


def prepare(network: torch.nn.Module, train: Train, device: torch.device) -> torch.nn.Module:
    """Move a network to its device, in the recipe's memory format, and compile it if the recipe says so."""
    network = place(network, device, train.channels_last)
    if train.compile:
        network.compile()
    return network


def place(network: torch.nn.Module, device: torch.device, channels_last: bool | None = None) -> torch.nn.Module:
    """Move a network to a device, in the memory format that suits it (see `select_channels_last`).

    Images that come in another format are converted when they enter the network: whatever mixes, crops or shards them,
    training, validation and benchmarks compute in one format.
    """
    network = network.to(device)
    if select_channels_last(channels_last, device):
        network = network.to(memory_format=torch.channels_last)
        network.register_forward_pre_hook(to_channels_last)
    return network


def to_channels_last(_: torch.nn.Module, images: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A forward pre-hook that converts images [B, C, H, W] to channels-last memory format."""
    return tuple(one.contiguous(memory_format=torch.channels_last) for one in images)
