"""What the families share: a convolution's place in a network and its twins, and norms fit to be evaluated."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..layers.group_conv import StaticGroupConv2d

__all__ = ["Connection", "GatedModel", "connect"]

Connection = Literal["dgc", "dense", "sgc"]


def connect(conv: nn.Conv2d, connection: Connection, preact: bool = True, **gating) -> nn.Module:
    """What takes the place of a convolution: a DGC layer, itself ("dense"), or a group convolution ("sgc").

    Args:
        gating: `heads`, `squeeze_rate` and `gate_factor`.
        preact: see `DynamicGroupConv2d`.

    Raises:
        ValueError: heads does not divide the channels, or there is no such connection.
    """
    if connection == "dgc":
        return DynamicGroupConv2d.like(conv, preact=preact, **gating)
    if connection == "sgc":
        return StaticGroupConv2d(conv, gating["heads"])
    if connection == "dense":
        return conv
    raise ValueError(f"connection={connection!r} is none of dgc, dense, sgc")


class GatedModel(nn.Module):
    """Mixed into every family: what DGC adds to timm's contract for a model."""

    @staticmethod
    def feature_cfg(keywords: dict[str, Any]) -> dict[str, Any]:
        """How timm takes features from a network of these keywords; timm changes it, so each call gets a new one."""
        return {}

    @torch.jit.ignore
    def connect_convolutions(
        self, chosen: Callable[[str, nn.Conv2d], bool], connection: Connection, preact: bool = True, **gating
    ) -> None:
        """Give the chosen ones of a ready network's convolutions their connection; see `connect`.

        Args:
            chosen: tells from its name and itself whether a convolution is meant.
        """
        for name, conv in list(self.named_modules()):
            if isinstance(conv, nn.Conv2d) and chosen(name, conv):
                self.set_submodule(name, connect(conv, connection, preact, **gating))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The biases of the gates: they start at one, and decay would close them."""
        layers = [(name, module) for name, module in self.named_modules() if isinstance(module, DynamicGroupConv2d)]
        return {f"{name}.gates.bias" for name, _ in layers}

    @torch.jit.ignore
    def settle_norms(self) -> None:
        """Set the statistics of every batch norm to those of a few images of noise.

        A batch norm starts with mean 0 and variance 1. Gates multiply features by features, so in a network in
        evaluation mode that has seen no data yet each layer would square what comes in, and the tenth or so
        overflow. Training forgets these statistics as it would forget the others.
        """
        first = next(module for module in self.modules() if isinstance(module, nn.Conv2d))
        if first.weight.is_meta:
            return
        # Images stay in bounds if they are no more extreme than what was seen here: hence noise from one colour to
        # single pixels, from faint to three standard deviations.
        side = max(32, 4 * self.feature_info[-1]["reduction"])
        draw = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        noise = torch.cat(
            [
                strength * F.interpolate(draw(1, first.in_channels, grain, grain), (side, side))
                for grain in (1, 2, 4, 8, side)
                for strength in (0.3, 1, 3)
            ]
        )

        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        training = self.training
        self.eval()  # dropout and stochastic depth stay out of it
        for norm in norms:
            norm.train().momentum = None  # the plain mean over batches, of which there is one
        with torch.no_grad():
            self.forward_features(noise.to(first.weight))
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            norm.num_batches_tracked.zero_()
        self.train(training)
