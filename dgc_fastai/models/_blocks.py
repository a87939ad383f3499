"""What the families share: the choice between a DGC layer and its baselines, and statistics for new batch norms."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers.dynamic_group_conv import DynamicGroupConv2d, fitting_granularity
from ..layers.group_conv import StaticGroupConv2d

__all__ = ["Connection", "GatedModel", "connect"]

Connection = Literal["dgc", "dense", "sgc"]


def connect(conv: nn.Conv2d, connection: Connection, preact: bool = True, **gating) -> nn.Module:
    """The module that replaces a convolution: a DGC layer ("dgc"), a static group convolution ("sgc"), or the
    convolution itself ("dense").

    Args:
        conv: an ordinary convolution; its weights are used for "dense" only.
        connection: one of the three.
        preact, gating: keywords of `DynamicGroupConv2d`, `granularity` as `fitting_granularity` makes it fit. "sgc"
            reads `heads`, "dense" none.

    Raises:
        ValueError: heads does not divide the channels, granularity is no power of two, or the connection is unknown.
    """
    if connection == "dgc":
        granularity = fitting_granularity(conv.in_channels, gating.pop("granularity", 1))
        return DynamicGroupConv2d.like(conv, preact=preact, granularity=granularity, **gating)
    if connection == "sgc":
        return StaticGroupConv2d(conv, gating["heads"])
    if connection == "dense":
        return conv
    raise ValueError(f"connection={connection!r} is none of dgc, dense, sgc")


class GatedModel(nn.Module):
    """Mixin of every family: what DGC adds to timm's interface of a model."""

    if TYPE_CHECKING:  # TorchScript would compile these annotations
        feature_info: list[dict[str, Any]]
        forward_features: Callable[[torch.Tensor], torch.Tensor]

    @staticmethod
    def feature_cfg(keywords: dict[str, Any]) -> dict[str, Any]:
        """timm's `feature_cfg` for a network with these keywords. A new dict each time, since timm modifies it."""
        return {}

    @torch.jit.ignore
    def connect_convolutions(
        self, is_selected: Callable[[str, nn.Conv2d], bool], connection: Connection, preact: bool = True, **gating
    ) -> None:
        """Replace the selected convolutions of a network that is already built; see `connect`.

        Args:
            is_selected: called with the name and the module of each convolution.
        """
        for name, conv in list(self.named_modules()):
            if isinstance(conv, nn.Conv2d) and is_selected(name, conv):
                self.set_submodule(name, connect(conv, connection, preact, **gating))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The gates' biases. They start at one; weight decay would close the gates."""
        layers = [(name, module) for name, module in self.named_modules() if isinstance(module, DynamicGroupConv2d)]
        return {f"{name}.gates.bias" for name, _ in layers}

    @torch.jit.ignore
    def init_norm_stats(self) -> None:
        """Initialize the running statistics of all batch norms from 15 images of noise.

        Gates multiply features by features. In evaluation mode, with the usual initial mean 0 and variance 1, each
        layer of an untrained network would square the scale of its input and about the tenth would overflow. Training
        replaces these statistics as it would replace 0 and 1.
        """
        first = next(module for module in self.modules() if isinstance(module, nn.Conv2d))
        if first.weight.is_meta:
            return
        # Images whose contrast and grain lie within this range do not overflow: from one color to single pixels, and
        # from 0.3 to 3 standard deviations.
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
        self.eval()  # no dropout, no stochastic depth
        for norm in norms:
            norm.train().momentum = None  # a cumulative average; here, the statistics of the one batch
        with torch.no_grad():
            self.forward_features(noise.to(first.weight))
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.zero_()
        self.train(training)
