"""How many channels each layer of a network keeps, so that the whole meets a budget.

The budget is in whatever the costs are in: MACs, or milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch.nn as nn

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..layers.gate_schedule import num_inactive
from .cost import Budget

__all__ = ["MIN_GATE_FACTOR", "Options", "allocate", "mac_budget", "mac_options", "one_gate_factor", "reach"]

MIN_GATE_FACTOR = 1 / 8
"""The smallest gate factor that is chosen: below it, a narrow layer's gates cost what they save."""


@dataclass(frozen=True)
class Options:
    """What a layer may keep: the cost of each choice, and what the network loses by it.

    Channels are counted in blocks where a layer keeps and drops them in blocks (`granularity`).
    """

    name: str
    costs: np.ndarray
    """[channels + 1]: of the layer that keeps as many of its input channels. The last is an ordinary convolution's."""
    losses: np.ndarray
    """[channels + 1]: how much the network loses if this layer alone keeps so many; zeros where nobody knows."""

    @property
    def channels(self) -> int:
        return len(self.costs) - 1

    @property
    def fewest(self) -> int:
        """The fewest channels that are kept."""
        return max(1, round(self.channels * MIN_GATE_FACTOR))

    @property
    def most(self) -> int:
        """The most channels that are kept by gates: with more, they cost as much as the ordinary convolution."""
        cheaper = np.flatnonzero(self.costs[self.fewest : -1] < self.costs[-1])
        return self.fewest + int(cheaper.max(initial=0))

    @property
    def step(self) -> float:
        """The cost of one channel more or less, as long as the layer has gates."""
        return float(self.costs[self.most] - self.costs[self.fewest]) / max(self.most - self.fewest, 1)

    def gate_factor(self, kept: int) -> float:
        """The gate factor of a layer that keeps so many channels."""
        return round(kept / self.channels, 5)  # exact for up to 50,000 channels


def mac_options(network: nn.Module, cost: Budget) -> list[Options]:
    """The options of a network's DGC layers, in MACs for one image.

    Args:
        network: with DGC layers, on any device.
        cost: of the network.
    """
    layers = {name: one for name, one in network.named_modules() if isinstance(one, DynamicGroupConv2d)}
    found: dict[str, np.ndarray] = {}
    for counted in cost.layers:
        if layer := layers.get(counted.name):
            blocks = layer.in_channels // layer.granularity
            by_block = counted.macs_dense // blocks
            kept = (
                blocks - num_inactive(layer.in_channels, layer.gate_factor, 1, layer.granularity) // layer.granularity
            )
            gates = counted.macs - by_block * kept
            costs = np.arange(blocks + 1) * by_block + gates
            costs[-1] -= gates
            found[counted.name] = costs + found.get(counted.name, 0)  # a layer that is called twice is counted twice
    return [Options(name, costs, np.zeros(len(costs))) for name, costs in found.items()]


def mac_budget(options: Sequence[Options], cost: Budget, target: float) -> float:
    """What a network's layers may cost together, so that the network costs a share of the dense network's MACs.

    Args:
        options: of the network's DGC layers.
        cost: of the network.
        target: the share, in (0, 1).

    Raises:
        ValueError: the layers cannot be so cheap.
    """
    least, most = reach(options)
    rest = cost.macs_dense - most
    budget = target * cost.macs_dense - rest
    if budget < least:
        lowest = (rest + least) / cost.macs_dense
        raise ValueError(
            f"target={target:g} is out of reach: with {MIN_GATE_FACTOR:g} of the channels in each layer that can be "
            f"converted, {lowest:.3f} of the MACs are left; use a target from {np.ceil(lowest * 100) / 100:.2f} to 1"
        )
    return budget


def reach(options: Sequence[Options]) -> tuple[float, float]:
    """The lowest cost of layers together that can be chosen, and their cost as ordinary convolutions."""
    return sum(float(one.costs[one.fewest :].min()) for one in options), sum(float(one.costs[-1]) for one in options)


def one_gate_factor(options: Sequence[Options], budget: float) -> float:
    """The gate factor that, given to all layers alike, meets a budget best, to three digits.

    Args:
        budget: of the layers together, in the unit of their costs.
    """
    factors = np.arange(round(MIN_GATE_FACTOR * 1000), 1000) / 1000
    return float(min(factors, key=lambda factor: abs(_cost_at(options, factor) - budget)))


def _cost_at(options: Sequence[Options], factor: float) -> float:
    kept = (one.channels - num_inactive(one.channels, factor, 1) for one in options)
    return sum(float(one.costs[max(number, one.fewest)]) for one, number in zip(options, kept))


def allocate(options: Sequence[Options], budget: float) -> dict[str, int]:
    """The number of channels that each layer keeps, at the least loss that a budget allows.

    The losses of layers are added up, as if one did not change what another loses. A layer closes along the lower
    convex hull of its options, and of all layers, that which loses least per saved cost closes next (Shoham and Gersho,
    "Efficient bit allocation for an arbitrary set of quantizers", 1988). The last one closes part of the way, and
    narrower steps of other layers make up for what its own leave over.

    Args:
        options: of all layers, with losses.
        budget: of the layers together, in the unit of their costs. One below all that can be chosen gives the cheapest.

    Returns:
        Kept channels by name. Their cost differs from the budget by at most half of the smallest step of a layer that
        closes, where these have room.
    """
    kept = {one.name: one.channels for one in options}
    spare = sum(float(one.costs[-1]) for one in options) - budget
    hull_steps = [(slope, place, start, end) for place, one in enumerate(options) for slope, start, end in _steps(one)]
    for _, place, start, end in sorted(hull_steps):
        one = options[place]
        is_last = one.costs[start] - one.costs[end] >= spare
        if is_last:  # part of the way
            between = np.append(start, np.arange(min(start, one.most), end - 1, -1))
            end = int(between[np.abs(one.costs[start] - one.costs[between] - spare).argmin()])
        kept[one.name] = end
        spare -= float(one.costs[start] - one.costs[end])
        if is_last:
            break
    return _refine(options, kept, spare)


def _steps(one: Options) -> list[tuple[float, int, int]]:
    """The edges of the lower convex hull of a layer's options, from all channels on: loss per saved cost, from, to."""
    losses = np.maximum.accumulate(one.losses[::-1])[::-1]  # noise aside, fewer channels lose more
    place, found = one.channels, []
    while place > one.fewest:
        fewer = np.arange(one.fewest, place)
        saved = one.costs[place] - one.costs[fewer]
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = np.where(saved > 0, (losses[fewer] - losses[place]) / saved, np.inf)
        if np.isinf(slopes).all():
            break
        end = int(fewer[np.isclose(slopes, slopes.min(), rtol=1e-9, atol=0)][0])  # the farthest of those in line
        found.append((float(slopes.min()), place, end))
        place = end
    return found


def _refine(options: Sequence[Options], kept: dict[str, int], spare: float) -> dict[str, int]:
    """Move layers that close by a few channels, those with large steps first, until no step brings the cost nearer.

    Args:
        spare: what the layers cost beyond the budget.
    """
    closing = [one for one in options if kept[one.name] < one.channels and one.step > 0]
    closing.sort(key=lambda one: -one.step)
    for _, equal in groupby(closing, key=lambda one: one.step):
        # Among layers of equal steps, that which loses least closes first, and that which loses most opens first.
        for one in sorted(equal, key=lambda one: float(np.sum(one.losses)), reverse=bool(spare < 0)):
            number = kept[one.name]
            moved = min(max(number - round(spare / one.step), one.fewest), one.most)
            spare -= float(one.costs[number] - one.costs[moved])
            kept[one.name] = moved
    return kept
