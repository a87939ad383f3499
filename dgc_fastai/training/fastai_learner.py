"""fastai's `vision_learner` for DGC networks."""

import inspect
from collections.abc import Sequence
from typing import Any

import timm
import torch
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize, get_c
from fastai.learner import Learner
from fastcore.basics import risinstance
from fastcore.foundation import L
from fastcore.meta import delegates

from .. import models  # noqa: F401  (registers the networks)
from ..recipe.schema import ARCHITECTURES
from .callbacks import AnnealGates

__all__ = ["dgc_learner"]


@delegates(Learner.__init__, keep=True, but=["dls", "model"])
def dgc_learner(
    dls: DataLoaders,
    arch: str | torch.nn.Module,
    normalize: bool = True,
    n_out: int | None = None,
    n_in: int = 3,
    lasso_weight: float = 1e-5,
    anneal: bool = True,
    cbs: Any = None,
    **kwargs: Any,
) -> Learner:
    """fastai's `vision_learner` for DGC networks, with `AnnealGates` and the paper's head: pooling, one linear layer.

    A new network of this package starts as its dense baseline does, which small data need: `zero_init_gates=True` and,
    for ResNets, `preact=False`. Pass the opposite for the published network, such as one for the authors' weights.

    `learn.model` is a timm model: `load_checkpoint`, `budget` and timm's own tools accept it. Body and classifier
    are two parameter groups, for `fine_tune`, `freeze` and a `slice` of learning rates.

    Args:
        dls: images [B, n_in, H, W] and their classes.
        arch: a name for `timm.create_model`, or a network, such as one from `convert`, with a classifier for `dls`.
        normalize: add `Normalize` with the network's own mean and deviation to `dls`, unless it has one or they are not
            for `n_in` channels.
        n_out: number of classes; by default that of `dls`.
        n_in: number of channels of the images.
        lasso_weight, anneal: see `AnnealGates`.
        cbs: more callbacks.
        kwargs: those of fastai's `Learner`; all others go to `timm.create_model`, such as `gate_factor`.

    Raises:
        ValueError: `n_out` is not given, and `dls` does not know its number of classes.
        TypeError: a keyword is neither the Learner's nor the network's, or is for a network that exists already.
    """
    network_only = {name: kwargs.pop(name) for name in list(kwargs) if name not in _LEARNER_KEYWORDS}
    if isinstance(arch, str):
        n_out = n_out or get_c(dls)
        if not n_out:
            raise ValueError("the number of classes is not known: set dls.c or pass n_out")
        model = timm.create_model(arch, num_classes=n_out, in_chans=n_in, **{**_as_dense(arch), **network_only})
    elif network_only:
        raise TypeError(f"{', '.join(network_only)}: a network that exists already takes no keywords")
    else:
        model = arch
    cfg = getattr(model, "default_cfg", None) or {}
    has_one = bool(dls.after_batch.fs.filter(risinstance(Normalize)))
    if normalize and not has_one and len(cfg.get("mean", ())) == n_in:
        dls.add_tfms([_normalization(cfg["mean"], cfg["std"], dls.device)], "after_batch")
    kwargs.setdefault("splitter", _body_and_classifier)
    return Learner(dls, model, cbs=[AnnealGates(lasso_weight, anneal), *L(cbs)], **kwargs)


def _normalization(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Normalize:
    """fastai's `Normalize` on the device of the data; by itself, it is on the first GPU if there is one."""
    normalize = Normalize.from_stats(mean, std, cuda=False)
    normalize.mean, normalize.std = normalize.mean.to(device), normalize.std.to(device)
    return normalize


def _as_dense(arch: str) -> dict[str, bool]:
    """The keywords with which a network of this package starts as its dense baseline does."""
    keywords = {"zero_init_gates": True, "preact": False}
    return {name: value for name, value in keywords.items() if name in ARCHITECTURES.get(arch, ())}


_LEARNER_KEYWORDS = inspect.signature(Learner).parameters.keys()


def _body_and_classifier(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """A network's parameters in two groups; the second is that of its last module, the classifier."""
    last = [list(child.parameters()) for child in model.children() if list(child.parameters())][-1]
    rest = [parameter for parameter in model.parameters() if not any(parameter is other for other in last)]
    return [group for group in (rest, last) if group]
