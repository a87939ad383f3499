"""How long a network's layers take on this machine, deployed, and the whole of it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..inference.deploy import deploy
from ..layers.gate_schedule import set_progress
from ..models.allocation import Options
from ..models.conversion import convert
from ..models.gate_counts import evaluating
from ..ops.device import device_wait
from ..recipe.conversion import Convert
from ..utils.timing import Variant, measure_times

__all__ = ["TimedNetwork"]

SHARES = (1 / 8, 1 / 2, 7 / 8)  # of the channels that a timed layer keeps
ROUNDS = 5
BLOCK = 0.02  # seconds of a timed block


class TimedNetwork:
    """A network before conversion, to be timed as it would be deployed with gates that have closed.

    Args:
        network: on the device to measure on, in the format that it will have there. It is not changed.
        settings: of `convert`.
        image: normalized, [1, C, H, W], on the same device.
        notify: called with what is going on.
    """

    def __init__(self, network: nn.Module, settings: Convert, image: Tensor, notify: Callable[[str], None]):
        self.network, self.settings, self.image, self.notify = network, settings, image, notify

    def ms(self, gate_factor: Mapping[str, float]) -> float:
        """Milliseconds of the image in the deployed network with these gate factors, the dense one if all are 1.

        The median of several rounds, after a warm-up.
        """
        self.notify("Timing the network")
        deployed = self._deployed(self.network, dict(gate_factor), tuple(self.image.shape[1:]))
        return self._times({"": deployed}, {"": self.image})[""]

    def options(self, options: Sequence[Options]) -> list[Options]:
        """The options of layers with milliseconds for costs: measured at three gate factors, linear between them."""
        inputs, found = self._inputs([one.name for one in options]), []
        for place, one in enumerate(options):
            self.notify(f"Timing the layers: {100 * place // len(options)} %")
            conv, x = self.network.get_submodule(one.name), inputs[one.name]
            layers = {f"{share}": self._deployed(nn.Sequential(conv), share, tuple(x.shape[1:])) for share in SHARES}
            layers["dense"] = deploy(nn.Sequential(conv))
            times = self._times(layers, dict.fromkeys(layers, x))
            kept = np.arange(one.channels + 1) / one.channels
            costs = np.interp(kept, SHARES, [times[f"{share}"] for share in SHARES])
            costs[-1] = times["dense"]
            found.append(replace(one, costs=costs))
        return found

    def _deployed(self, network: nn.Module, gate_factor: float | dict[str, float], size: tuple[int, ...]) -> nn.Module:
        return deploy(self._converted(network, gate_factor, size))

    def _converted(self, network: nn.Module, gate_factor: float | dict[str, float], size: tuple[int, ...]) -> nn.Module:
        """A copy with gates that have closed; without any if all gate factors are 1."""
        network = deepcopy(network)
        if isinstance(gate_factor, float) or any(factor < 1 for factor in gate_factor.values()):
            keywords = {**self.settings.keywords(), "gate_factor": gate_factor}
            if isinstance(gate_factor, float):
                keywords["skip"] = []  # a layer alone has another name
            convert(network, **keywords, input_size=size)
            set_progress(network, 1)
        return network

    def _inputs(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What layers see of the image."""
        found: dict[str, Tensor] = {}

        def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, args[0].clone())

        handles = [self.network.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in names]
        try:
            with evaluating(self.network):
                self.network(self.image)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _times(self, networks: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """Median milliseconds of each network."""
        variants = [Variant(name, nullcontext, partial(one, inputs[name])) for name, one in networks.items()]
        with torch.no_grad():
            times = measure_times(variants, ROUNDS, device_wait(self.image.device), block=BLOCK)
        return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
