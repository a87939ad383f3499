"""The cost of a network for one image: multiply-accumulates (MACs) and parameters, layer by layer."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..layers.gate_schedule import num_inactive

__all__ = ["Budget", "LayerBudget", "budget"]


@dataclass(frozen=True)
class LayerBudget:
    """The cost of one convolution or linear layer for one image. MACs include those of the gates."""

    name: str
    kind: str
    output: tuple[int, ...]
    """Shape of the output, without the batch."""
    macs: int
    """MACs with the target share of channels kept, `gate_factor`."""
    macs_now: int
    """MACs with as many channels kept as the layer keeps now."""
    macs_dense: int
    """MACs of an ordinary convolution of the same shape."""
    parameters: int


@dataclass(frozen=True)
class Budget:
    """The cost of a network for one image."""

    layers: tuple[LayerBudget, ...]
    operations: float
    """The authors' count, as published: MACs with `gate_factor * channels` channels kept, not rounded, plus one
    operation for each value that a ReLU, a pooling window or a gate reads, and for each bias."""
    parameters: int
    output: tuple[int, ...] = ()
    """Shape of the network's output, without the batch; empty if it is no single tensor."""

    @property
    def macs(self) -> int:
        """MACs with the target share of channels kept."""
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_now(self) -> int:
        """MACs with as many channels kept as are kept now."""
        return sum(layer.macs_now for layer in self.layers)

    @property
    def macs_dense(self) -> int:
        """MACs of the network with an ordinary convolution in place of each DGC layer."""
        return sum(layer.macs_dense for layer in self.layers)


def budget(model: nn.Module, input_size: int | Sequence[int]) -> Budget:
    """Count the cost of a network for one image, from shapes alone: no weight is read, no image computed.

    Args:
        model: any network of convolutions and linear layers, on any device, "meta" included. It is not changed.
        input_size: (channels, height, width), or the side of a square image of 3 channels, in pixels.

    Raises:
        ValueError: the network cannot take an image of that size.
    """
    shape = (3, input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    counter = _Counter(model)
    with torch.no_grad(), counter:
        try:
            # The meta device computes shapes only.
            output = counter.shadow(torch.empty(1, *shape, device="meta"))
        except (RuntimeError, AssertionError, IndexError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the network cannot take images of {shape}: {reason}") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    output_shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
    return Budget(tuple(counter.layers), counter.operations, parameters, output_shape)


class _Counter:
    """Counts, by hooks, while a copy of the model runs on the meta device."""

    def __init__(self, model: nn.Module):
        self.layers: list[LayerBudget] = []
        self.operations = 0.0
        self.shadow = copy.deepcopy(model).to("meta").float().eval()
        self.inactive = {
            name: 0 if module.inactive_channels.is_meta else int(module.inactive_channels)
            for name, module in model.named_modules()
            if isinstance(module, DynamicGroupConv2d)
        }
        self.handles: list = []

    def __enter__(self) -> None:
        for name, module in self.shadow.named_modules():
            count = next((count for kind, count in self._counts.items() if isinstance(module, kind)), None)
            if count:
                self.handles.append(module.register_forward_hook(partial(self._visit, name, count)))

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def _visit(self, name: str, count: Callable, module: nn.Module, args: tuple, output: Tensor) -> None:
        count(self, name, module, args[0], output)

    def _add(self, name: str, module: nn.Module, output: Tensor, macs: int, now: int, dense: int) -> None:
        parameters = sum(parameter.numel() for parameter in module.parameters())
        kind, shape = type(module).__name__, tuple(output.shape[1:])
        self.layers.append(LayerBudget(name, kind, shape, macs, now, dense, parameters))

    def dgc(self, name: str, module: DynamicGroupConv2d, x: Tensor, output: Tensor) -> None:
        channels = module.in_channels
        gates = module.gates.squeeze.numel() + module.gates.excite.numel()
        per_channel = output[0].numel() * module.kernel_size[0] * module.kernel_size[1]
        target = channels - num_inactive(channels, module.gate_factor, 1, module.granularity)
        now = channels - self.inactive[name]
        macs_target, macs_now = (kept * per_channel + gates for kept in (target, now))
        self._add(name, module, output, macs_target, macs_now, channels * per_channel)
        # Pooling and the layer's own ReLU, if any, read the whole input. Each head has two ReLUs, a bias and a product
        # of the channels with the gates.
        hidden, blocks = module.gates.squeeze.shape[1], channels // module.granularity
        per_head = hidden + 2 * blocks + channels
        self.operations += (2 if module.preact else 1) * x[0].numel() + module.heads * per_head + gates
        self.operations += channels * per_channel * module.gate_factor

    def conv(self, name: str, module: nn.Conv2d, x: Tensor, output: Tensor) -> None:
        macs = output[0].numel() * module.weight[0].numel()
        self._add(name, module, output, macs, macs, macs)
        self.operations += macs

    def linear(self, name: str, module: nn.Linear, x: Tensor, output: Tensor) -> None:
        macs = output[0].numel() * module.in_features
        self._add(name, module, output, macs, macs, macs)
        self.operations += macs + (output[0].numel() if module.bias is not None else 0)

    def relu(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        self.operations += x[0].numel()

    def pool(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        window: Any = module.kernel_size
        area = window**2 if isinstance(window, int) else window[0] * window[1]
        self.operations += output[0].numel() * area

    _counts: ClassVar[dict[Any, Callable[..., None]]] = {
        DynamicGroupConv2d: dgc,
        nn.Conv2d: conv,
        nn.Linear: linear,
        (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.AdaptiveAvgPool2d): relu,
        (nn.AvgPool2d, nn.MaxPool2d): pool,
    }
