"""A batch norm as `x * scale + shift`, for a kernel that applies it where it reads x, and the pooling before it."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .reference import apply_norm


def fold(norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] in float32. In training they are the batch's, which counts in the running statistics."""
    if norm.training or norm.running_mean is None:
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        if norm.training and norm.running_mean is not None:
            _count(norm, mean.detach(), var.detach(), x.numel() // x.shape[1])
    else:
        assert norm.running_var is not None
        mean, var = norm.running_mean.float(), norm.running_var.float()
    return affine(norm, mean, (var + norm.eps).rsqrt())


def affine(norm: nn.BatchNorm2d, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm whose features have this mean and inverse standard deviation."""
    if norm.weight is None:
        return inverse, -mean * inverse  # type: ignore[unreachable]
    scale = inverse * norm.weight.to(inverse.dtype)
    return scale, norm.bias.to(inverse.dtype) - mean * scale


def _count(norm: Any, mean: Tensor, var: Tensor, size: int) -> None:
    norm.num_batches_tracked.add_(1)
    share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    for running, batch in ((norm.running_mean, mean), (norm.running_var, var * (size / (size - 1)))):
        running.copy_(running + share * (batch - running))


class Pooled(torch.autograd.Function):
    """The mean over the pixels of `relu(x * scale + shift)`: [B, C, H, W] -> [B, C]. Keeps x and nothing as large."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        return apply_norm(x, scale, shift).mean((2, 3), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, shift = ctx.saved_tensors
        passed = (apply_norm(x, scale, shift) > 0).float() * (grad / (x.shape[2] * x.shape[3]))[:, :, None, None]
        dx = (passed * scale.reshape(1, -1, 1, 1)).to(x.dtype)
        return dx, (passed * x).sum((0, 2, 3)), passed.sum((0, 2, 3))
