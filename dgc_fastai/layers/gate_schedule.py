"""What training does to the gates of a network: the annealing schedule and the penalty (paper, section 3).

Su, Fang et al., "Dynamic Group Convolution for Accelerating Convolutional Neural Networks", ECCV 2020.
"""

import torch
import torch.nn as nn
from torch import Tensor

from .dynamic_group_conv import DynamicGroupConv2d

__all__ = ["dgc_layers", "gate_penalty", "num_inactive", "set_progress"]


def num_inactive(channels: int, gate_factor: float, progress: float) -> int:
    """Number of input channels that each head drops at `progress` in [0, 1].

    None for the first twelfth of training, then linearly more, and all `channels * (1 - gate_factor)` from three
    quarters on.
    """
    # The order of the factors matters: another one rounds differently at exact halves.
    if progress <= 1 / 12:
        return 0
    if progress < 3 / 4:
        return round(channels * (1 - gate_factor) * 3 / 2 * (progress - 1 / 12))
    return round(channels * (1 - gate_factor))


def dgc_layers(model: nn.Module) -> list[DynamicGroupConv2d]:
    """The DGC layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, DynamicGroupConv2d)]


def set_progress(model: nn.Module, progress: float) -> None:
    """Set the number of inactive channels of every DGC layer to what the schedule says for `progress`.

    Args:
        model: any module.
        progress: finished training steps / all training steps, in [0, 1].

    Raises:
        ValueError: progress is outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} is not in [0, 1]")
    for layer in dgc_layers(model):
        layer.inactive_channels.fill_(num_inactive(layer.in_channels, layer.gate_factor, progress))


def gate_penalty(model: nn.Module) -> Tensor:
    """Sum over layers and heads of the mean gate in the last forward pass in training mode.

    Differentiable, and taken before any channel is dropped. Zero for a model without DGC layers.

    Returns:
        A scalar in float32.

    Raises:
        RuntimeError: a DGC layer has not been run in training mode.
    """
    layers = dgc_layers(model)
    penalties = [layer.penalty for layer in layers if layer.penalty is not None]
    if len(penalties) < len(layers):
        raise RuntimeError("gate_penalty needs a forward pass in training mode first")
    if not layers:
        return torch.zeros((), device=next((p.device for p in model.parameters()), None))
    return torch.stack(penalties).sum()
