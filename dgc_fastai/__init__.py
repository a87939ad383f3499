"""Dynamic Group Convolution (ECCV 2020) for fastai and timm.

Public names are loaded when first used, so `import dgc_fastai` costs nothing. The networks are known to
`timm.create_model` once both packages are imported, in either order.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import models
    from .analysis.gate_controls import gate_controls, replaced_gates
    from .inference.deploy import deploy
    from .layers.dynamic_group_conv import DynamicGroupConv2d
    from .layers.gate_schedule import gate_penalty, set_progress
    from .models.checkpoints import load_checkpoint, save_checkpoint
    from .models.conversion import convert
    from .models.cost import budget
    from .models.gate_statistics import gate_statistics
    from .recipe.loading import load_recipe
    from .training.callbacks import AnnealGates, Distillation
    from .training.fastai_learner import dgc_learner
    from .training.run import build_learner
    from .utils.errors import CheckpointError, RecipeError

__version__ = "0.1.0"
__all__ = [
    "AnnealGates",
    "CheckpointError",
    "Distillation",
    "DynamicGroupConv2d",
    "RecipeError",
    "budget",
    "build_learner",
    "convert",
    "deploy",
    "dgc_learner",
    "gate_controls",
    "gate_penalty",
    "gate_statistics",
    "load_checkpoint",
    "load_recipe",
    "models",
    "replaced_gates",
    "save_checkpoint",
    "set_progress",
]

_MODULES = {
    "AnnealGates": "training.callbacks",
    "CheckpointError": "utils.errors",
    "Distillation": "training.callbacks",
    "DynamicGroupConv2d": "layers.dynamic_group_conv",
    "RecipeError": "utils.errors",
    "budget": "models.cost",
    "build_learner": "training.run",
    "convert": "models.conversion",
    "deploy": "inference.deploy",
    "dgc_learner": "training.fastai_learner",
    "gate_controls": "analysis.gate_controls",
    "gate_penalty": "layers.gate_schedule",
    "gate_statistics": "models.gate_statistics",
    "load_checkpoint": "models.checkpoints",
    "load_recipe": "recipe.loading",
    "replaced_gates": "analysis.gate_controls",
    "save_checkpoint": "models.checkpoints",
    "set_progress": "layers.gate_schedule",
}


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module(".models", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterAfterTimm(importlib.abc.MetaPathFinder):
    """Imports `dgc_fastai.models`, which registers the networks, right after timm itself."""

    def __init__(self) -> None:
        self.is_searching = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "timm" or self.is_searching:
            return None
        self.is_searching = True  # the other finders find it
        try:
            spec = importlib.util.find_spec("timm")
        finally:
            self.is_searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            importlib.import_module(f"{__name__}.models")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module(".models", __name__)
else:
    sys.meta_path.insert(0, _RegisterAfterTimm())
