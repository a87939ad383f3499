"""The orders of the callbacks, beside those of fastai."""

from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.distributed import DistributedTrainer
from fastai.learner import Recorder

from dgc_fastai.training.callbacks.distillation import Distillation
from dgc_fastai.training.callbacks.distributed import ReduceOverProcesses
from dgc_fastai.training.callbacks.ema import AverageWeights
from dgc_fastai.training.callbacks.gates import AnnealGates
from dgc_fastai.training.callbacks.nonfinite import NonFiniteLoss
from dgc_fastai.training.callbacks.progress import TrainingDisplay
from dgc_fastai.training.callbacks.run_recorder import RunRecorder
from dgc_fastai.training.callbacks.save_state import SaveState
from dgc_fastai.training.loggers import Trackio

EXPECTED = [
    Distillation, AnnealGates, ReduceOverProcesses, GradientAccumulation, MixedPrecision, DistributedTrainer,
    AverageWeights, Recorder, NonFiniteLoss, ProgressCallback, RunRecorder, TrainingDisplay, SaveState,
]  # fmt: skip


def test_each_callback_has_its_place():
    orders = [callback.order for callback in EXPECTED]
    assert orders == sorted(set(orders))
    assert RunRecorder.order < Trackio.order < SaveState.order
