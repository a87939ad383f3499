"""Weights of EfficientNet-PyTorch (lukemelas) and of the packages that keep its names, by the names that timm has."""

import re

import torch.nn as nn
from torch import Tensor

__all__ = ["with_timm_names"]

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# timm counts a block's normalization layers from 1, and calls the last convolution of a block that does not expand its
# channels the first pointwise one.
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_SQUEEZING = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")


def with_timm_names(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict by timm's names; names that EfficientNet-PyTorch has not stay as they are.

    Args:
        network: an EfficientNet of timm, which has the blocks of each stage in a list of their own.
    """
    blocks = [f"blocks.{stage}.{place}" for stage, own in enumerate(_stages(network)) for place in range(len(own))]
    expanding = {name.split(".")[1] for name in state if name.startswith("_blocks.") and "._expand_conv." in name}

    def renamed(name: str) -> str:
        layer, _, kind = name.partition(".")
        if found := _BLOCK.fullmatch(name):
            number, layer, kind = found.groups()
            names = (_EXPANDING if number in expanding else _PLAIN) | _SQUEEZING
            if int(number) < len(blocks) and layer in names:
                return f"{blocks[int(number)]}.{names[layer]}.{kind}"
        elif layer in _OUTSIDE:
            return f"{_OUTSIDE[layer]}.{kind}"
        return name

    return {renamed(name): tensor for name, tensor in state.items()}


def _stages(network: nn.Module) -> list[nn.Sequential]:
    stages = getattr(network, "blocks", None)
    return [one for one in stages if isinstance(one, nn.Sequential)] if isinstance(stages, nn.Sequential) else []
