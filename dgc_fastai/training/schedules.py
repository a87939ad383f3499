"""A recipe's schedule -> learning rate, and momentum, as functions of training progress in [0, 1]."""

from collections.abc import Callable

from fastai.callback.schedule import SchedCos, SchedLin, combined_cos

from ..recipe.schema import Recipe

__all__ = ["schedules"]

Schedule = Callable[[float], float]


def schedules(recipe: Recipe) -> dict[str, Schedule]:
    """Schedules for fastai's ParamScheduler, by the name of the hyperparameter: `lr`, and `mom` for one_cycle.

    cosine and multistep are the authors'; one_cycle and flat_cosine are fastai's with its defaults. A warm-up rises
    linearly from a hundredth of the learning rate; cosine then falls over the rest of the run.
    """
    train = recipe.train
    if train.schedule == "one_cycle":
        rate = combined_cos(0.25, train.lr / 25, train.lr, train.lr / 1e5)
        return {"lr": rate, "mom": combined_cos(0.25, 0.95, 0.85, 0.95)}
    warm = train.warmup / train.epochs
    warming = SchedLin(train.lr / 100, train.lr)
    main: Schedule = {
        "cosine": lambda done: SchedCos(train.lr, 0)((done - warm) / (1 - warm)),
        "flat_cosine": combined_cos(0.75, train.lr, train.lr, train.lr / 1e5),
        "multistep": lambda done: train.lr * 0.1 ** _steps(recipe, done),
    }[train.schedule]
    return {"lr": lambda done: warming(done / warm) if done < warm else main(done)}


def _steps(recipe: Recipe, done: float) -> int:
    """How often multistep has divided by ten: every 30 epochs on ImageNet, else at 1/2 and 3/4 of the run."""
    epochs = recipe.train.epochs
    epoch = int(done * epochs + 1e-6)  # fastai adds `done` up step by step, so it can be slightly too small
    if recipe.data.name == "imagenet":
        return epoch // 30
    return (epoch >= 0.5 * epochs) + (epoch >= 0.75 * epochs)
