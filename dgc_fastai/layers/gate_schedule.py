"""What training does to the gates of a network: the annealing schedule and the penalty (paper, section 3).

Su, Fang et al., "Dynamic Group Convolution for Accelerating Convolutional Neural Networks", ECCV 2020.
"""

from collections.abc import MutableMapping

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .dynamic_group_conv import DynamicGroupConv2d

__all__ = ["dgc_layers", "gate_penalty", "num_inactive", "set_progress"]


def num_inactive(channels: int, gate_factor: float, progress: float, granularity: int = 1) -> int:
    """Number of input channels that each head drops at `progress` in [0, 1].

    None for the first twelfth of training, then linearly more, and all `channels * (1 - gate_factor)` from three
    quarters on. In blocks of `granularity` channels, whole blocks are counted, and one is always kept.
    """
    if granularity > 1:
        blocks = channels // granularity
        return granularity * min(num_inactive(blocks, gate_factor, progress), blocks - 1)
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
        inactive = num_inactive(layer.in_channels, layer.gate_factor, progress, layer.granularity)
        _write(layer.inactive_channels, inactive)


_written: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()


def _write(counter: Tensor, value: int) -> None:
    """Fill a tensor unless it holds this value already: counts seldom change, and a GPU need not hear of it each step.

    What it holds is not read back, which would stall a GPU, but remembered with PyTorch's count of its changes, so that
    nothing else that writes to it goes unnoticed; nor does a copy, which is another tensor.
    """
    if counter.is_inference():  # its changes are not counted
        counter.fill_(value)
    elif _written.get(counter) != (counter._version, value):
        counter.fill_(value)
        _written[counter] = counter._version, value


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
    if all(penalty.dim() for penalty in penalties):  # by image and head: two kernels for all layers
        return torch.cat([penalty.flatten() for penalty in penalties]).sum()
    return torch.stack([penalty.sum() if penalty.dim() else penalty for penalty in penalties]).sum()
