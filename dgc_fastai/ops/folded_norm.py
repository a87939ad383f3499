"""A batch norm as `x * scale + shift`."""

import torch.nn as nn
from torch import Tensor


def affine(norm: nn.BatchNorm2d, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm whose features have this mean and inverse standard deviation."""
    if norm.weight is None:
        return inverse, -mean * inverse  # type: ignore[unreachable]
    scale = inverse * norm.weight.to(inverse.dtype)
    return scale, norm.bias.to(inverse.dtype) - mean * scale
