"""The callbacks of a training run: one duty each."""

from .accumulation import WholeBatchAccumulation
from .distillation import Distillation
from .ema import AverageWeights
from .gates import AnnealGates
from .mixing import DeviceCutMix, DeviceMixUp, MixUpOrCutMix
from .nonfinite import NonFiniteLoss
from .precision import DeviceMixedPrecision

__all__ = [
    "AnnealGates",
    "AverageWeights",
    "DeviceCutMix",
    "DeviceMixUp",
    "DeviceMixedPrecision",
    "Distillation",
    "MixUpOrCutMix",
    "NonFiniteLoss",
    "WholeBatchAccumulation",
]
