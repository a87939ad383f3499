"""A recipe's optimizer, and its parameter groups."""

import inspect
from typing import Any

import timm.optim
import torch
from fastai.optimizer import OptimWrapper
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from ..recipe.schema import Train
from ..utils.errors import RecipeError
from ..utils.text import did_you_mean

__all__ = ["all_parameters", "build_optimizer", "split_by_decay"]


def all_parameters(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """A network's parameters in one group, as the authors decay them."""
    return [list(model.parameters())]


def split_by_decay(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """A network's parameters in two groups; the second, of normalization layers and biases by timm's rule, has no
    weight decay."""
    undecayed, decayed = (group["params"] for group in param_groups_weight_decay(model))
    return [decayed, undecayed]


def build_optimizer(groups: list[list[torch.nn.Parameter]], lr: float, train: Train) -> OptimWrapper:
    """timm's optimizer of the recipe's name; only the first group has weight decay.

    Raises:
        RecipeError: timm has no optimizer of that name, or it cannot be used here.
    """
    name = train.optimizer
    try:
        info: Any = timm.optim.get_optimizer_info(name)
    except ValueError:
        known = map(str, timm.optim.list_optimizers())
        hint = did_you_mean(name, known) or "; see timm.optim.list_optimizers()"
        raise RecipeError(f"train.optimizer: timm has no {name!r}{hint}") from None
    if info.second_order:
        raise RecipeError(f"train.optimizer: {name} needs second derivatives, which fastai's loop does not compute")
    decays = train.weight_decay, 0.0
    parameters = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays)]
    keywords: dict[str, Any] = {"momentum": train.momentum}
    if info.opt_class in (torch.optim.SGD, torch.optim.AdamW) and groups[0][0].is_cuda:
        keywords["fused"] = True  # one kernel for all parameters
    try:
        if info.has_betas and info.num_betas == 2:
            betas = inspect.signature(info.opt_class).parameters["betas"].default
            keywords.update(betas=(train.momentum, betas[1]) if betas else None)
        return OptimWrapper(opt=create_optimizer_v2(parameters, name, lr, train.weight_decay, **keywords))
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # it needs a package or a GPU
        raise RecipeError(f"train.optimizer: {name} cannot be used here: {' '.join(str(error).split())}") from None
