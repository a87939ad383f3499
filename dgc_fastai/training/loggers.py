"""The services that a recipe logs to, if they are installed: TensorBoard, Weights & Biases, trackio."""

from pathlib import Path

from fastai.callback.core import Callback

from ..recipe.schema import Recipe
from ..utils.errors import RecipeError
from .callbacks.order import SHOW_ROW

__all__ = ["logging_callbacks"]


def logging_callbacks(recipe: Recipe, folder: Path) -> list[Callback]:
    """A callback for each logger in `log.loggers`. Each names the run after its folder.

    Raises:
        RecipeError: a logger does not start.
    """
    callbacks = []
    for name in recipe.log.loggers:
        try:
            callbacks.append({"tensorboard": _tensorboard, "wandb": _wandb, "trackio": Trackio}[name](recipe, folder))
        except Exception as error:  # each service has its own errors: no network, no login, no space
            raise RecipeError(f"log.loggers: {name} does not start: {' '.join(str(error).split())[:200]}") from None
    return callbacks


def _tensorboard(recipe: Recipe, folder: Path) -> Callback:
    from fastai.callback.tensorboard import TensorBoardCallback

    class TensorBoard(TensorBoardCallback):
        def after_batch(self):  # fastai's expects every setting of the optimizer to be a number
            if self.training:
                self.writer.add_scalar("train_loss", self.smooth_loss, self.train_iter)
                self.writer.add_scalar("lr", self.opt.hypers[-1]["lr"], self.train_iter)

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
        self.service.log(row, step=row["epoch"])

    def after_fit(self):
        self.service.finish()
