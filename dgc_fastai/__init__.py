"""Dynamic Group Convolution (ECCV 2020) for fastai and timm. Importing it registers the models with timm."""

from . import models  # noqa: F401
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .conv import DynamicGroupConv2d, gate_penalty, set_progress
