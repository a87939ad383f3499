"""Where a run is logged beside its folder: the services that a recipe names, if they are installed."""

from pathlib import Path

from fastai.callback.core import Callback

from ..recipe.schema import Recipe
from ..utils.errors import RecipeError

__all__ = ["logging_callbacks"]


def logging_callbacks(recipe: Recipe, folder: Path) -> list[Callback]:
    """A callback for each logger in `log.loggers`, which name the run after its folder.

    Raises:
        RecipeError: one does not start.
    """
    callbacks = []
    for name in recipe.log.loggers:
        try:
            callbacks.append({"tensorboard": _tensorboard, "wandb": _wandb, "trackio": Trackio}[name](recipe, folder))
        except Exception as error:  # each service has errors of its own, for no network, no login, no space
            raise RecipeError(f"log.loggers: {name} does not start: {' '.join(str(error).split())[:200]}") from None
    return callbacks


def _tensorboard(recipe: Recipe, folder: Path) -> Callback:
    from fastai.callback.tensorboard import TensorBoardCallback

    class TensorBoard(TensorBoardCallback):
        def after_batch(self):  # fastai's wants every setting of the optimiser to be a number
            if self.training:
                self.writer.add_scalar("train_loss", self.smooth_loss, self.train_iter)
                self.writer.add_scalar("lr", self.opt.hypers[-1]["lr"], self.train_iter)

    # Neither a trace of the network nor pictures: both run it once more, which moves norms and random numbers.
    return TensorBoard(folder / "tensorboard", trace_model=False, log_preds=False)


def _wandb(recipe: Recipe, folder: Path) -> Callback:
    import wandb
    from fastai.callback.wandb import WandbCallback

    class Wandb(WandbCallback):
        def before_fit(self):
            self.learn.gather_args = dict  # the recipe is logged; fastai's list of arguments breaks at paths
            super().before_fit()
            del self.learn.gather_args

        def after_fit(self):
            super().after_fit()
            wandb.finish()  # the next run of a sweep is another one

    config = recipe.model_dump()
    wandb.init(project=recipe.name, name=folder.name, id=folder.name, dir=folder, config=config, resume="allow")
    return Wandb(log_preds=False)


class Trackio(Callback):
    """Logs each epoch's row to trackio. fastai has no callback for it."""

    order = 75  # after the run folder (70) has made the row

    def __init__(self, recipe: Recipe, folder: Path):
        import trackio

        self.service = trackio
        self.service.init(project=recipe.name, name=folder.name, config=recipe.model_dump(), resume="allow")

    def after_epoch(self):
        row = self.run_folder.rows[-1]
        self.service.log(row, step=row["epoch"])

    def after_fit(self):
        self.service.finish()
