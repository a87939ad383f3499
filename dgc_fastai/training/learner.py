"""A fastai Learner, from a recipe or from data of one's own, and the two things to do with it: fit and evaluate."""

import inspect
from functools import partial
from typing import Any, Optional, Union

import timm
import timm.optim
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize, get_c
from fastai.learner import AvgMetric, CancelEpochException, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastcore.basics import risinstance
from fastcore.foundation import L
from fastcore.meta import delegates

from ..data.loaders import build_dataloaders
from ..models.factory import build_model, prepare
from ..ops.device import use_device
from ..recipe.schema import Recipe
from ..utils.errors import RecipeError, TrainingError
from .callbacks import (
    AnnealGates,
    AverageWeights,
    DeviceMixedPrecision,
    MixUpOrCutMix,
    NonFiniteLoss,
    WholeBatchAccumulation,
)
from .distributed import join, together
from .metrics import top_1, top_5
from .optimizer import _by_decay, _one_group, _optimizer
from .schedules import schedules

__all__ = ["RecipeLearner", "assemble", "build_learner", "dgc_learner", "evaluate", "fit"]


class RecipeLearner(Learner):
    """A Learner whose fit can begin at a later epoch, without a word to the callbacks about those before."""

    first_epoch = 0

    def _do_fit(self):
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, "epoch", CancelEpochException)


def build_learner(recipe: Recipe) -> Learner:
    """A fastai Learner with the recipe's data, network, optimiser, gates and precision, ready to fit.

    Seeds Python's, numpy's and torch's random numbers with `train.seed` first.

    Args:
        recipe: from `load_recipe`.

    Raises:
        RecipeError: the data, the network, the optimiser or the device cannot be had.
    """
    device = use_device(recipe.device)
    join(device)
    if device.type != "cuda" and recipe.train.precision == "fp16":
        raise RecipeError("train.precision: fp16 needs a CUDA device; use bf16 or float32 here")
    set_seed(recipe.train.seed)
    model = prepare(build_model(recipe), recipe, device)
    return assemble(recipe, build_dataloaders(recipe.data, device), model)


def assemble(recipe: Recipe, dls: DataLoaders, model: torch.nn.Module) -> RecipeLearner:
    """The Learner of a recipe, around data and a network that are there already.

    Raises:
        RecipeError: timm has no such optimiser, or it cannot be used here.
    """
    train = recipe.train
    learn = RecipeLearner(
        dls,
        model,
        loss_func=CrossEntropyLossFlat(label_smoothing=train.label_smoothing),
        opt_func=partial(_optimizer, train=train),
        splitter=_one_group if train.decay_norms else _by_decay,
        lr=train.lr,
        metrics=[AvgMetric(top_1), AvgMetric(top_5)],
        cbs=_callbacks(recipe),
    )
    learn.create_opt()
    return learn


def _callbacks(recipe: Recipe) -> list:
    train = recipe.train
    callbacks: list = [AnnealGates(train.lasso_weight), NonFiniteLoss(skip=train.nonfinite == "skip")]
    if train.precision != "float32":
        callbacks.append(DeviceMixedPrecision(amp_mode=train.precision))
    if train.mixup and train.cutmix:
        callbacks.append(MixUpOrCutMix(train.mixup, train.cutmix))
    elif train.mixup or train.cutmix:
        callbacks.append(MixUp(train.mixup) if train.mixup else CutMix(train.cutmix))
    if train.accumulate > 1:
        callbacks.append(WholeBatchAccumulation(train.accumulate * recipe.data.batch_size))
    if train.clip:
        callbacks.append(GradientClip(train.clip))
    if train.ema:
        callbacks.append(AverageWeights(train.ema))
    return callbacks


def fit(learn: Learner, recipe: Recipe, first_epoch: int = 0) -> None:
    """Train a Learner from `build_learner` by the recipe's schedule, together with other processes if there are any.

    Args:
        first_epoch: where a run that is resumed goes on.

    Raises:
        TrainingError: the loss or the weights are not finite any more.
    """
    scheduled = {name: curve for name, curve in schedules(recipe).items() if name in learn.opt.hypers[0]}
    learn.first_epoch = first_epoch
    try:
        with together(learn):
            learn.fit(recipe.train.epochs, recipe.train.lr, cbs=ParamScheduler(scheduled))
    finally:
        learn.first_epoch = 0
    if learn.non_finite_loss.problem:
        raise TrainingError(f"{learn.non_finite_loss.problem}; use a smaller train.lr, or train.clip")


@delegates(Learner.__init__, keep=True, but=["dls", "model"])
def dgc_learner(
    dls: DataLoaders,
    arch: Union[str, torch.nn.Module],
    normalize: bool = True,
    n_out: Optional[int] = None,
    n_in: int = 3,
    lasso: float = 1e-5,
    anneal: bool = True,
    cbs: Any = None,
    **kwargs: Any,
) -> Learner:
    """fastai's `vision_learner` for DGC networks, with `AnnealGates` and the paper's head: pooling, one linear layer.

    The network is timm's as it stands, so `load_checkpoint`, `budget` and timm's own tools take `learn.model`. Body and
    classifier are parameter groups of their own, for `fine_tune`, `freeze` and `slice` of learning rates.

    Args:
        dls: images [B, n_in, H, W] and their classes.
        arch: a name for `timm.create_model`, or a network, such as one from `convert`, with a classifier for `dls`.
        normalize: add the network's own `Normalize` to `dls`, if there is none yet and it is for `n_in` channels.
        n_out: number of classes, by default that of `dls`.
        n_in: channels of the images.
        lasso, anneal: see `AnnealGates`.
        cbs: more callbacks.
        kwargs: of fastai's `Learner`; all others are keywords for `timm.create_model`, such as `gate_factor`.

    Raises:
        ValueError: the number of classes is not given and `dls` does not know it.
        TypeError: a keyword is neither the Learner's nor the network's.
    """
    network_only = {name: kwargs.pop(name) for name in list(kwargs) if name not in _LEARNER_KEYWORDS}
    if isinstance(arch, str):
        n_out = n_out or get_c(dls)
        if not n_out:
            raise ValueError("the number of classes is not known: set dls.c or pass n_out")
        model = timm.create_model(arch, num_classes=n_out, in_chans=n_in, **network_only)
    elif network_only:
        raise TypeError(f"{', '.join(network_only)}: a network that is there already takes no keywords")
    else:
        model = arch
    cfg = getattr(model, "default_cfg", None) or {}
    has_one = bool(dls.after_batch.fs.filter(risinstance(Normalize)))
    if normalize and not has_one and len(cfg.get("mean", ())) == n_in:
        dls.add_tfms([Normalize.from_stats(cfg["mean"], cfg["std"])], "after_batch")
    kwargs.setdefault("splitter", _body_and_classifier)
    return Learner(dls, model, cbs=[AnnealGates(lasso, anneal), *L(cbs)], **kwargs)


_LEARNER_KEYWORDS = inspect.signature(Learner).parameters.keys()


def _body_and_classifier(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """A network's parameters in two groups; the second is of its last module, the classifier."""
    last = [list(child.parameters()) for child in model.children() if list(child.parameters())][-1]
    rest = [parameter for parameter in model.parameters() if not any(parameter is other for other in last)]
    return [group for group in (rest, last) if group]


def evaluate(learn: Learner) -> dict[str, float]:
    """Loss, top-1 and top-5 over the validation images, the accuracies in [0, 1].

    Of several processes each looks at its part of the images, and all return what one would.
    """
    with together(learn):
        return dict(zip(("loss", "top_1", "top_5"), map(float, learn.validate())))
