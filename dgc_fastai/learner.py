"""A recipe -> a fastai Learner, and the two things to do with it: fit and evaluate."""

from functools import partial

import timm
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.data.core import DataLoaders
from fastai.learner import AvgMetric, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, top_k_accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed

from . import models  # noqa: F401  (registers the networks)
from .callbacks import AnnealGates
from .data import build_dataloaders, class_names, input_size
from .errors import RecipeError
from .recipe import Recipe

__all__ = ["assemble", "build_learner", "build_model", "evaluate", "fit", "select_device"]


def top_1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of images whose likeliest class is the right one."""
    return accuracy(prediction, target)


def top_5(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of images whose right class is among the five likeliest."""
    return top_k_accuracy(prediction, target, k=min(5, prediction.shape[-1]))


def select_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        RecipeError: this build of torch cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device: {name}, but this installation of torch cannot use CUDA; use device=cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RecipeError(f"device: {name}, but this installation of torch cannot use it; use device=cpu")
    return torch.device(name)


def build_model(recipe: Recipe) -> torch.nn.Module:
    """The recipe's network with fresh weights, sized for its data.

    Raises:
        RecipeError: the network's keywords do not go together.
    """
    classes, (channels, *_) = len(class_names(recipe.data)), input_size(recipe.data)
    try:
        return timm.create_model(recipe.model.arch, num_classes=classes, in_chans=channels, **recipe.model.keywords())
    except ValueError as error:
        raise RecipeError(f"model: {error}") from None


def build_learner(recipe: Recipe) -> Learner:
    """A fastai Learner with the recipe's data, network, optimiser, gates and precision, ready to fit.

    Seeds Python's, numpy's and torch's random numbers with `train.seed` first.

    Args:
        recipe: from `load_recipe`.

    Raises:
        RecipeError: the data, the network or the device cannot be had.
    """
    device = select_device(recipe.device)
    if device.type == "cpu" and recipe.train.precision != "float32":
        raise RecipeError(f"train.precision: {recipe.train.precision} needs a CUDA device; use float32 here")
    set_seed(recipe.train.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    model = build_model(recipe).to(device)
    return assemble(recipe, build_dataloaders(recipe.data, device), model)


def assemble(recipe: Recipe, dls: DataLoaders, model: torch.nn.Module) -> Learner:
    """The Learner of a recipe, around data and a network that are there already."""
    callbacks = [AnnealGates(recipe.train.lasso)]
    if recipe.train.precision != "float32":
        callbacks.append(MixedPrecision(amp_mode=recipe.train.precision))
    return Learner(
        dls,
        model,
        loss_func=CrossEntropyLossFlat(),
        opt_func=_optimizer(recipe),
        lr=recipe.train.lr,
        wd=recipe.train.weight_decay,
        wd_bn_bias=True,  # the authors decay every parameter
        metrics=[AvgMetric(top_1), AvgMetric(top_5)],
        cbs=callbacks,
    )


def _optimizer(recipe: Recipe):
    momentum = recipe.train.momentum
    if recipe.train.optimizer == "adamw":
        return partial(OptimWrapper, opt=torch.optim.AdamW, betas=(momentum, 0.999))
    return partial(OptimWrapper, opt=torch.optim.SGD, momentum=momentum, nesterov=momentum > 0)


def fit(learn: Learner, recipe: Recipe) -> None:
    """Train a Learner from `build_learner` by the recipe's schedule."""
    train = recipe.train
    if train.schedule == "one_cycle":
        learn.fit_one_cycle(train.epochs, train.lr)
    else:
        learn.fit(train.epochs, train.lr, cbs=ParamScheduler({"lr": SchedCos(train.lr, 0)}))


def evaluate(learn: Learner) -> dict[str, float]:
    """Loss, top-1 and top-5 over the validation images, the accuracies in [0, 1]."""
    return dict(zip(("loss", "top_1", "top_5"), map(float, learn.validate())))
