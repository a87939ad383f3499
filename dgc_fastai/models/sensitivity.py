"""How much a network loses by each of its layers: they are closed one at a time, before any training of gates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .gate_counts import evaluating

__all__ = ["GATE_FACTORS", "losses_by_channels", "scan_layers"]

GATE_FACTORS = (0.75, 0.5, 0.25, 0.125)
"""Those that each layer is closed to."""

BATCH = 64


def scan_layers(
    model: nn.Module,
    names: Sequence[str],
    images: Tensor,
    heads: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """The damage that closing single layers of a trained network does to its outputs.

    A closed convolution keeps, in each head and for each image, the channels that contribute most: those with the
    largest product of the filters' norm and the root mean square of the image's own values. That is what trained gates
    can choose; those of a network fresh from `convert` choose by the filters alone.

    Args:
        model: before `convert`. It is not changed.
        names: of its ordinary convolutions to close.
        images: normalized, [N, C, H, W], on any device; a few hundred.
        heads: of the layers that `convert` would make.
        advance: called after each of `len(names) * len(GATE_FACTORS)` evaluations.

    Returns:
        For each name, the Kullback-Leibler divergence of the closed network's class probabilities from those of the
        network as it is, in nats, for each of `GATE_FACTORS`; the mean over the images.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        batches = [part.to(device) for part in images.split(BATCH)]
        expected = [model(part).float().log_softmax(-1) for part in batches]
        found: dict[str, list[float]] = {}
        for name in names:
            found[name] = []
            for factor in GATE_FACTORS:
                with _closed(model.get_submodule(name), heads, factor):
                    outputs = [model(part).float().log_softmax(-1) for part in batches]
                pairs = zip(outputs, expected)
                total = sum(F.kl_div(one, other, reduction="sum", log_target=True) for one, other in pairs)
                found[name].append(float(total) / len(images))
                advance()
    return found


def losses_by_channels(divergences: Sequence[float], channels: int) -> np.ndarray:
    """What `scan_layers` found for a layer, as a loss for each number of channels kept: [channels + 1].

    The loss is the square root of the divergence, which grows with the square of what moves the outputs. Between the
    gate factors it is linear.
    """
    factors = [*GATE_FACTORS[::-1], 1.0]
    losses = np.sqrt(np.maximum(divergences[::-1], 0))
    return np.interp(np.arange(channels + 1) / channels, factors, [*losses, 0.0])


@contextmanager
def _closed(conv: Any, heads: int, factor: float) -> Iterator[None]:
    """Within this context, each head of a convolution sees only the channels that contribute most for an image."""
    conv.forward = partial(closed_forward, conv, heads, factor)
    try:
        yield
    finally:
        del conv.forward


def closed_forward(conv: nn.Conv2d, heads: int, factor: float, x: Tensor) -> Tensor:
    kept = max(1, round(conv.in_channels * factor))
    filters = conv.weight.unflatten(0, (-1, heads))  # output channel o is computed by head o % heads
    norms = filters.float().flatten(3).square().sum((0, 3)).sqrt()  # [heads, C]
    contribution = x.float().square().mean((2, 3)).sqrt().unsqueeze(1) * norms  # [B, heads, C]
    chosen = torch.zeros_like(contribution).scatter_(-1, contribution.topk(kept, sorted=False).indices, 1).to(x.dtype)
    outputs = [
        F.conv2d(x * chosen[:, head, :, None, None], filters[:, head], None, conv.stride, conv.padding, conv.dilation)
        for head in range(heads)
    ]
    y = torch.stack(outputs, 2).flatten(1, 2)
    return y if conv.bias is None else y + conv.bias.reshape(1, -1, 1, 1)
