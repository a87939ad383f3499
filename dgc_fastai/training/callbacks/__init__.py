"""The callbacks of a training run: one duty each."""

from .accumulation import WholeBatchAccumulation
from .ema import AverageWeights
from .gates import AnnealGates
from .mixing import MixUpOrCutMix
from .nonfinite import NonFiniteLoss
from .precision import DeviceMixedPrecision

__all__ = [
    "AnnealGates",
    "AverageWeights",
    "DeviceMixedPrecision",
    "MixUpOrCutMix",
    "NonFiniteLoss",
    "WholeBatchAccumulation",
]
