"""Dynamic Group Convolution (ECCV 2020) for fastai and timm. Importing it registers the models with timm."""

import os as _os

# app.py sets this while it checks a recipe, so that a mistake is answered before torch is imported.
if "DGC_FASTAI_RECIPE_ONLY" not in _os.environ:
    from . import models
    from .budget import budget
    from .callbacks import AnnealGates
    from .checkpoint import load_checkpoint, save_checkpoint
    from .conv import DynamicGroupConv2d, gate_penalty, set_progress
    from .convert import convert
    from .deploy import deploy
    from .errors import CheckpointError, RecipeError
    from .learner import build_learner, dgc_learner
    from .recipe import load_recipe

    __all__ = [
        "AnnealGates",
        "CheckpointError",
        "DynamicGroupConv2d",
        "RecipeError",
        "budget",
        "build_learner",
        "convert",
        "deploy",
        "dgc_learner",
        "gate_penalty",
        "load_checkpoint",
        "load_recipe",
        "models",
        "save_checkpoint",
        "set_progress",
    ]
