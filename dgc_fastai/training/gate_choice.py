"""The gate factors that a recipe's target asks for, chosen once, before training, by what each layer is worth."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from ..data.loaders import training_images
from ..models.allocation import Options, allocate, mac_budget
from ..models.conversion import convert
from ..models.cost import Budget, budget
from ..models.factory import conversion_options
from ..models.sensitivity import GATE_FACTORS, losses_by_channels, scan_layers
from ..recipe.schema import Recipe
from ..utils import launch
from ..utils.errors import RecipeError, UserError
from .collectives import broadcast_bytes
from .layer_times import TimedNetwork
from .state_file import random_state_kept

__all__ = ["GateChoice", "choose_gate_factors"]

MAX_MACS = 2e13  # of a scan, if MIN_IMAGES allow that: minutes
MIN_IMAGES, MAX_IMAGES = 64, 512
ATTEMPTS = 3  # to come to a time


@dataclass(frozen=True)
class GateChoice:
    """What was chosen for a target, and why."""

    gate_factor: dict[str, float]
    """For the name of each convolution; 1 for those that stay as they are."""
    rows: list[dict[str, Any]]
    """For each layer: its name, MACs of the convolution, what the network loses if half of its channels are closed
    (Kullback-Leibler divergence of its outputs, in nats), the gate factor, and MACs with it."""
    images: int
    """How many training images say so."""
    ms: dict[str, float] | None = None
    """Measured milliseconds of an image, deployed: `dense`, and `reached` with the gates closed as chosen."""

    def table(self) -> str:
        """The rows as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


def choose_gate_factors(
    network: nn.Module,
    recipe: Recipe,
    classes: Sequence[str],
    device: torch.device,
    notify: Callable[[str], None] = lambda text: None,
) -> GateChoice:
    """Choose a gate factor for each layer that `convert` would make, so that the network meets the recipe's target.

    The main process measures, and all processes have its result. No random number is drawn.

    Args:
        network: with trained weights, before conversion. It is not changed.
        recipe: with `model.convert.target` or `target_ms`.
        classes: class names.
        device: where to measure.
        notify: called with what is going on.

    Raises:
        RecipeError: there is nothing to convert, the target is out of reach, or an image cannot be read.
    """
    answer: dict[str, Any] = {}
    if launch.is_main_process():
        try:
            with random_state_kept():
                answer = vars(_Chooser(network, recipe, classes, device, notify).choose())
        except UserError as error:  # which the others wait for
            answer = {"error": str(error)}
    answer = json.loads(broadcast_bytes(json.dumps(answer).encode()) or b"")
    if "error" in answer:
        raise RecipeError(answer["error"])
    return GateChoice(**answer)


class _Chooser:
    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        classes: Sequence[str],
        device: torch.device,
        notify: Callable[[str], None],
    ):
        assert recipe.model.convert
        self.settings, self.input_size, self.notify = recipe.model.convert, recipe.data.input_size, notify
        self.network, self.device = deepcopy(network).to(device), device
        try:
            self.options, self.cost = conversion_options(network, self.settings, self.input_size)
            if self.settings.target:
                mac_budget(self.options, self.cost, self.settings.target)
        except ValueError as error:
            raise RecipeError(f"model.convert: {error}") from None
        evaluations = len(self.options) * len(GATE_FACTORS)
        affordable = int(MAX_MACS / max(1, evaluations * self.cost.macs_dense))
        self.images = training_images(recipe.data, device, classes, min(max(affordable, MIN_IMAGES), MAX_IMAGES))

    def choose(self) -> GateChoice:
        done, total = 0, len(self.options) * len(GATE_FACTORS)

        def advance() -> None:
            nonlocal done
            done += 1
            self.notify(f"What each of {len(self.options)} layers is worth: {100 * done // total} %")

        names = [one.name for one in self.options]
        losses = scan_layers(self.network, names, self.images, self.settings.heads, advance)
        if not all(math.isfinite(loss) for found in losses.values() for loss in found):
            raise RecipeError("model.convert: the weights to choose gate factors for give outputs that are NaN or Inf")
        self.at_half = {name: found[GATE_FACTORS.index(0.5)] for name, found in losses.items()}
        self.options = [replace(one, losses=losses_by_channels(losses[one.name], one.channels)) for one in self.options]
        if self.settings.target:
            return self._chosen(
                self._allocated(self.options, mac_budget(self.options, self.cost, self.settings.target))
            )
        return self._chosen_for_ms(self.settings.target_ms or 0.0)

    def _allocated(self, options: Sequence[Options], most: float) -> dict[str, float]:
        kept = allocate(options, most)
        return {one.name: one.gate_factor(kept[one.name]) for one in options}

    def _chosen_for_ms(self, target: float) -> GateChoice:
        """Costs of single layers say where to cut; the time of the whole network, how much."""
        times = TimedNetwork(self.network, self.settings, self.images[:1], self.notify)
        options = times.options(self.options)
        least, dense = times.ms(self._allocated(options, 0)), times.ms({})
        if not least <= target < dense:
            at_best = (
                f"{least:.3g} ms at best; use a time between" if least < dense else "closing layers saves none here"
            )
            raise RecipeError(
                f"model.convert: target_ms={target:g} is out of reach: an image takes {dense:.3g} ms in the deployed "
                f"dense network here, and {at_best}"
            )
        layers = sum(float(one.costs[-1]) for one in options)
        aim, tried = layers - (dense - target), []
        for _ in range(ATTEMPTS):
            factors = self._allocated(options, aim)
            tried.append((times.ms(factors), factors))
            aim -= tried[-1][0] - target
        reached, best = min(tried, key=lambda one: abs(one[0] - target))
        return self._chosen(best, {"dense": dense, "reached": reached})

    def _chosen(self, factors: dict[str, float], ms: dict[str, float] | None = None) -> GateChoice:
        if all(factor == 1 for factor in factors.values()):
            raise RecipeError("model.convert: no layer closes for a target so near the dense network; use a lower one")
        keywords = {**self.settings.keywords(), "gate_factor": factors}
        closed = budget(
            convert(deepcopy(self.network).to("meta"), **keywords, input_size=self.input_size), self.input_size
        )
        macs, dense = _macs(closed), _macs(self.cost, dense=True)
        rows = [
            {
                "layer": one.name,
                "macs_dense": dense[one.name],
                "loss_at_half": round(self.at_half[one.name], 6),
                "gate_factor": factors[one.name],
                "macs": macs[one.name],
            }
            for one in self.options
        ]
        return GateChoice(factors, rows, len(self.images), ms)


def _macs(cost: Budget, dense: bool = False) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer in cost.layers:
        found[layer.name] = found.get(layer.name, 0) + (layer.macs_dense if dense else layer.macs)
    return found
