"""DGC for networks that were made without it: any CNN of timm, torchvision or one's own."""

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch.nn as nn

from ..layers.dynamic_group_conv import DynamicGroupConv2d, fitting_granularity, squeezed_channels
from ..utils.text import did_you_mean
from .cost import budget

__all__ = ["convert"]

_logger = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    heads: int = 4,
    gate_factor: float | Mapping[str, float] = 0.25,
    skip: str | Sequence[str] = (),
    squeeze_rate: int = 16,
    input_size: Sequence[int] | None = None,
    granularity: int = 1,
) -> nn.Module:
    """Replace the convolutions of a CNN by DGC layers that keep their weights.

    The network then computes what it did before: all gates start open, and within 3e-4 of one. Train it further with
    `AnnealGates`, or `set_progress` and `gate_penalty`, and they learn which channels each image needs while they
    close. Normalization layers and activations stay where the network has them.

    Not replaced are convolutions with groups, with fewer than eight input channels, such as the first one, or with a
    number of output channels that `heads` does not divide; those whose output is a single pixel, as in
    squeeze-and-excitation and in classifiers; and subclasses of `nn.Conv2d` and convolutions with hooks, which do more
    than convolve. Each of these and its reason is logged at level INFO. Networks whose branches are merged after
    training, such as RepVGG and MobileOne, have to be merged first.

    Args:
        model: changed in place. Create the optimizer of its parameters afterwards.
        heads, squeeze_rate, granularity: of every DGC layer, see `DynamicGroupConv2d` and `fitting_granularity`.
        gate_factor: of every DGC layer; or a gate factor for each name of a convolution, with wildcards, of which the
            first that fits counts: `{"layer1.*": 1, "*": 0.5}`. A name's 1 leaves the convolution as it is.
        skip: names of modules that are not replaced, with wildcards: `"layer1.*"`.
        input_size: (channels, height, width) of its images in pixels; by default timm's `default_cfg`, or 224 px.

    Returns:
        The same model.

    Raises:
        ValueError: there is no convolution to replace, heads is less than 1 or squeeze_rate less than 2, gate_factor
            is outside (0, 1], or misses a convolution or names none, granularity is no power of two, or the network
            cannot take images of that size. The model is then unchanged.
    """
    patterns = [skip] if isinstance(skip, str) else list(skip)
    convolutions = [one for one in model.named_modules(remove_duplicate=False) if isinstance(one[1], nn.Conv2d)]
    _check(heads, squeeze_rate, gate_factor, [name for name, _ in convolutions])
    shapes = _output_shapes(model, input_size)
    layers: dict[nn.Module, DynamicGroupConv2d | None] = {}
    replaced, left = [], []
    for name, module in convolutions:
        is_skipped = any(fnmatch(name, pattern) for pattern in patterns)
        reason = "skipped" if is_skipped else _reason_against(module, shapes.get(module), heads, squeeze_rate)
        if not reason and module not in layers:  # a convolution that two parents share stays shared
            layers[module] = _gated(module, heads, _factor_of(name, gate_factor), squeeze_rate, granularity)
        if layer := None if reason else layers[module]:
            replaced.append((name, layer))
        else:
            left.append(f"{name}: {reason or 'its gate factor is 1'}")
    if not replaced:
        reasons = f" ({'; '.join(left[:3])})" if left else ""
        raise ValueError(f"{type(model).__name__} has no convolution to convert{reasons}")
    for name, gated in replaced:
        model.set_submodule(name, gated)
    for line in (f"converted {len(replaced)} of {len(convolutions)} convolutions", *(f"left {line}" for line in left)):
        _logger.info(line)
    return model


def _output_shapes(model: nn.Module, input_size: Sequence[int] | None) -> dict[nn.Module, tuple[int, ...]]:
    counted = budget(model, input_size or _input_size(model)).layers
    return {model.get_submodule(layer.name): layer.output for layer in counted}


def _check(heads: int, squeeze_rate: int, gate_factor: float | Mapping[str, float], names: Sequence[str]) -> None:
    if heads < 1 or squeeze_rate < 2:
        raise ValueError(f"heads={heads} or squeeze_rate={squeeze_rate} is too small")
    for pattern in gate_factor if isinstance(gate_factor, Mapping) else ():
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"gate_factor: no convolution is called {pattern!r}{did_you_mean(pattern, names)}")


def _factor_of(name: str, gate_factor: float | Mapping[str, float]) -> float | None:
    """The gate factor of a convolution; None to leave it as it is."""
    if not isinstance(gate_factor, Mapping):
        return gate_factor
    found = next((factor for pattern, factor in gate_factor.items() if fnmatch(name, pattern)), None)
    if found is None:
        raise ValueError(f"gate_factor has none for {name}; add one for '*', all others")
    return None if found == 1 else found


def _input_size(model: nn.Module) -> tuple[int, ...]:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    area = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    return first.in_channels if first else 3, *area


def _reason_against(conv: nn.Conv2d, output: tuple[int, ...] | None, heads: int, squeeze_rate: int) -> str | None:
    """Why a convolution cannot become a DGC layer, or should not."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, not an ordinary convolution"
    if conv._forward_hooks or conv._forward_pre_hooks:
        return "it has hooks"
    if output is None:
        return "it is not called as a module"
    if conv.groups > 1:
        return f"it has {conv.groups} groups"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "its padding is not plain zeros"
    if conv.in_channels < 8 or squeezed_channels(conv.in_channels, squeeze_rate) < 1:
        return f"{conv.in_channels} input channels are too few to choose from"
    if conv.out_channels % heads:
        return f"heads={heads} does not divide its {conv.out_channels} output channels"
    if output[-2:] == (1, 1):
        return "it sees a single pixel"
    return None


def _gated(
    conv: nn.Conv2d, heads: int, gate_factor: float | None, squeeze_rate: int, granularity: int
) -> DynamicGroupConv2d | None:
    """A DGC layer that computes what a convolution does, with its very parameters; None without a gate factor."""
    granularity = fitting_granularity(conv.in_channels, granularity)
    if gate_factor is None:
        return None
    gating = dict(heads=heads, gate_factor=gate_factor, squeeze_rate=squeeze_rate, granularity=granularity)
    layer = DynamicGroupConv2d.like(conv, **gating, preact=False)
    layer.weight, layer.bias = conv.weight, conv.bias  # type: ignore[assignment]  # nn.Parameters
    layer.open_gates()
    return layer.train(conv.training)
