"""A recipe's optimizer, and its parameter groups."""

import inspect
from typing import Any

import timm
import timm.optim
import torch
from fastai.optimizer import OptimWrapper
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from ..recipe.schema import Train
from ..utils.errors import RecipeError
from ..utils.text import did_you_mean


def _one_group(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    return [list(model.parameters())]


def _by_decay(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Norms' and biases' parameters apart, by timm's rule."""
    undecayed, decayed = (group["params"] for group in param_groups_weight_decay(model))
    return [decayed, undecayed]


def _optimizer(groups: list[list[torch.nn.Parameter]], lr: float, train: Train) -> OptimWrapper:
    """timm's optimiser of that name; only the first group is decayed."""
    name = train.optimizer
    try:
        info = timm.optim.get_optimizer_info(name)
    except ValueError:
        hint = did_you_mean(name, timm.optim.list_optimizers()) or "; see timm.optim.list_optimizers()"
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
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # a package or GPU it needs
        raise RecipeError(f"train.optimizer: {name} cannot be used here: {' '.join(str(error).split())}") from None
