"""The services that a recipe logs to, if they are installed: TensorBoard, Weights & Biases, trackio."""

from pathlib import Path

import numpy as np
from fastai.callback.core import Callback
from fastai.learner import Learner

from ..recipe.schema import Recipe
from ..utils.errors import RecipeError
from .callbacks.gate_log import GateLog
from .callbacks.order import SHOW_ROW

__all__ = ["logging_callbacks"]


def logging_callbacks(recipe: Recipe, folder: Path, has_gates: bool) -> list[Callback]:
    """A callback for each logger in `log.loggers`, and one that looks at the gates for them.

    Each logger names the run after its folder.

    Args:
        has_gates: whether the network has DGC layers.

    Raises:
        RecipeError: a logger does not start.
    """
    callbacks: list[Callback] = [GateLog()] if has_gates and recipe.log.loggers else []
    for name in recipe.log.loggers:
        try:
            callbacks.append({"tensorboard": _tensorboard, "wandb": _wandb, "trackio": Trackio}[name](recipe, folder))
        except Exception as error:  # each service has its own errors: no network, no login, no space
            raise RecipeError(f"log.loggers: {name} does not start: {' '.join(str(error).split())[:200]}") from None
    return callbacks


def _gates(learn: Learner) -> tuple[dict[str, float], np.ndarray | None]:
    """What `GateLog` has found in this epoch, numbers and a picture; nothing in a network without gates."""
    found = getattr(learn, "gate_log", None)
    return (found.numbers, found.picture) if found else ({}, None)


def _tensorboard(recipe: Recipe, folder: Path) -> Callback:
    from fastai.callback.tensorboard import TensorBoardCallback

    class TensorBoard(TensorBoardCallback):
        def after_batch(self):  # fastai's expects every setting of the optimizer to be a number
            if self.training:
                self.writer.add_scalar("train_loss", self.smooth_loss, self.train_iter)
                self.writer.add_scalar("lr", self.opt.hypers[-1]["lr"], self.train_iter)

        def after_epoch(self):
            super().after_epoch()
            numbers, picture = _gates(self.learn)
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, self.train_iter)
            if picture is not None:
                self.writer.add_image("gates", picture, self.train_iter, dataformats="HWC")

    # No trace of the network and no pictures: both run it again, which changes statistics and random numbers.
    return TensorBoard(folder / "tensorboard", trace_model=False, log_preds=False)


def _wandb(recipe: Recipe, folder: Path) -> Callback:
    import wandb
    from fastai.callback.wandb import WandbCallback

    class Wandb(WandbCallback):
        def before_fit(self):
            self.learn.gather_args = dict  # the recipe is logged instead: fastai's list of arguments fails for paths
            super().before_fit()
            del self.learn.gather_args

        def after_epoch(self):
            super().after_epoch()
            numbers, picture = _gates(self.learn)
            pictures = {} if picture is None else {"gates": wandb.Image(picture)}
            wandb.log({**numbers, **pictures}, step=self._wandb_step)

        def after_fit(self):
            super().after_fit()
            wandb.finish()  # the next run of a sweep is a new one

    config = recipe.model_dump()
    wandb.init(project=recipe.name, name=folder.name, id=folder.name, dir=folder, config=config, resume="allow")
    return Wandb(log_preds=False)


class Trackio(Callback):
    """Logs each epoch's row to trackio, for which fastai has no callback."""

    order = SHOW_ROW

    def __init__(self, recipe: Recipe, folder: Path):
        import trackio

        self.service = trackio
        self.service.init(project=recipe.name, name=folder.name, config=recipe.model_dump(), resume="allow")

    def after_epoch(self):
        row = self.run_recorder.rows[-1]
        numbers, picture = _gates(self.learn)
        pictures = {} if picture is None else {"gates": self.service.Image(picture)}
        self.service.log({**row, **numbers, **pictures}, step=row["epoch"])

    def after_fit(self):
        self.service.finish()
