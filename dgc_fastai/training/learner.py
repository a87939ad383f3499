"""The train section of a recipe -> a fastai Learner, its fit and its evaluation."""

from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import AvgMetric, CancelEpochException, Learner
from fastai.losses import CrossEntropyLossFlat

from ..ops.device import resolve
from ..recipe.schema import Recipe
from ..utils.errors import TrainingError
from .callbacks import (
    AnnealGates,
    AverageWeights,
    DeviceCutMix,
    DeviceMixedPrecision,
    DeviceMixUp,
    Distillation,
    MixUpOrCutMix,
    NonFiniteLoss,
    WholeBatchAccumulation,
)
from .distributed import distributed_context
from .metrics import top_1, top_5
from .optimizer import all_parameters, build_optimizer, split_by_decay
from .schedules import schedules

__all__ = ["RecipeLearner", "assemble", "evaluate"]


class RecipeLearner(Learner):
    """A Learner that trains by its recipe's schedule, from any epoch; see `assemble`."""

    recipe: Recipe
    first_epoch = 0

    def fit_recipe(self, first_epoch: int = 0) -> None:
        """Train by the recipe's schedule, together with other processes if there are any.

        Args:
            first_epoch: where a resumed run continues, from 0. No callback hears of the epochs before it.

        Raises:
            TrainingError: the loss or the weights are NaN or Inf.
        """
        train = self.recipe.train
        scheduled = {name: curve for name, curve in schedules(self.recipe).items() if name in self.opt.hypers[0]}
        self.first_epoch = first_epoch
        try:
            with distributed_context(self):
                self.fit(train.epochs, train.lr, cbs=ParamScheduler(scheduled))
        finally:
            self.first_epoch = 0
        if self.non_finite_loss.problem:
            raise TrainingError(f"{self.non_finite_loss.problem}; use a smaller train.lr, or train.clip")

    def _do_fit(self):
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, "epoch", CancelEpochException)


def assemble(
    recipe: Recipe, dls: DataLoaders, model: torch.nn.Module, teacher: torch.nn.Module | None = None
) -> RecipeLearner:
    """The Learner of a recipe, around data and a network that exist already.

    Args:
        dls: of `EpochDL`s, as `build_dataloaders` makes them.
        teacher: to learn from, see `Distillation`.

    Raises:
        RecipeError: timm has no such optimizer, or it cannot be used here; or the device has not the precision.
    """
    recipe = resolve(recipe, next(model.parameters()).device)
    train = recipe.train
    learn = RecipeLearner(
        dls,
        model,
        loss_func=CrossEntropyLossFlat(label_smoothing=train.label_smoothing),
        opt_func=partial(build_optimizer, train=train),
        splitter=all_parameters if train.decay_norms else split_by_decay,
        lr=train.lr,
        metrics=[AvgMetric(top_1), AvgMetric(top_5)],
        cbs=_callbacks(recipe),
    )
    if teacher is not None:
        learn.add_cb(Distillation(teacher, train.teacher_weight, train.teacher_temperature))
    learn.recipe = recipe
    learn.create_opt()
    return learn


def _callbacks(recipe: Recipe) -> list[Callback]:
    train = recipe.train
    callbacks: list[Callback] = [AnnealGates(train.lasso_weight), NonFiniteLoss(skip=train.nonfinite == "skip")]
    if train.precision != "float32":
        callbacks.append(DeviceMixedPrecision(amp_mode=train.precision))
    if train.mixup and train.cutmix:
        callbacks.append(MixUpOrCutMix(train.mixup, train.cutmix))
    elif train.mixup or train.cutmix:
        callbacks.append(DeviceMixUp(train.mixup) if train.mixup else DeviceCutMix(train.cutmix))
    if train.accumulate > 1:
        callbacks.append(WholeBatchAccumulation(train.accumulate * recipe.data.batch_size))
    if train.clip:
        callbacks.append(GradientClip(train.clip))
    if train.ema:
        callbacks.append(AverageWeights(train.ema))
    return callbacks


def evaluate(learn: Learner) -> dict[str, float]:
    """Loss, top-1 and top-5 over the validation images, the accuracies in [0, 1].

    Of several processes, each evaluates its shard of the images, and all return the numbers of the whole set.
    """
    with distributed_context(learn):
        return dict(zip(("loss", "top_1", "top_5"), map(float, learn.validate())))
