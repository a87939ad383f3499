"""What a report measures of stored runs: cost by layer, latency, and validation images."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from ...inference.predict import Predictor
from ...layers.gate_schedule import dgc_layers
from ...models.cost import budget
from ...models.factory import build_model
from ...recipe.schema import GATES
from ...utils.errors import UserError
from ...utils.text import one_line
from .collect import StoredRun
from .evaluation import ValidationImages
from .latency import MAX_BATCH, measure_latency

__all__ = ["MeasuredRun", "measure_runs"]

MAX_EVALUATED = 4  # of several runs: the best ones

Show = Callable[[str], None]


class MeasuredRun:
    """A stored run, its network, and what was measured of it."""

    def __init__(self, run: StoredRun):
        self.run = run
        self.predictor: Predictor | None = None
        self.layers: list[dict[str, Any]] | None = None
        self.latency: list[dict[str, Any]] | None = None
        self.evaluation: dict[str, Any] | None = None
        self.gates = run.gates
        self.is_gated = any((row.get("inactive") or 0) > 0 for row in run.history)

    def load(self) -> None:
        """Read the weights, and count what the network costs."""
        assert self.run.weights is not None
        try:
            self.predictor = Predictor.from_weights(self.run.weights)
        except (RuntimeError, UserError) as error:
            self.run.missing.append(f"The weights cannot be read: {one_line(error)[:300]}")
        else:
            self._count_cost(self.predictor)

    @property
    def top_1(self) -> float | None:
        """Of the best epoch, in [0, 1]."""
        return (self.run.summary.get("best") or {}).get("top_1")

    @property
    def kind(self) -> str | None:
        """The same for runs whose networks differ in their weights only; None if there is no network."""
        recipe, best = self.run.recipe, self.run.summary.get("best") or {}
        if recipe is None or self.run.weights is None:
            return None
        return f"{recipe.model.model_dump_json()} {recipe.data.model_dump_json()} {best.get('inactive')}"

    @property
    def form(self) -> tuple | None:
        """What the speed of the network depends on; None without a network."""
        if self.predictor is None:
            return None
        inactive = [int(layer.inactive_channels) for layer in dgc_layers(self.predictor.model)]
        model, data = self.predictor.recipe.model, self.predictor.recipe.data
        return model.model_dump_json(), data.input_size, len(self.predictor.classes), tuple(inactive)

    def _count_cost(self, predictor: Predictor) -> None:
        self.is_gated = bool(dgc_layers(predictor.model))
        try:
            cost = budget(predictor.model, predictor.recipe.data.input_size)
        except ValueError as error:
            self.run.missing.append(f"Cost by layer: {error}")
            return
        self.layers = [asdict(layer) for layer in cost.layers]


def measure_runs(runs: Sequence[MeasuredRun], deadline: float | None, show: Show) -> None:
    """Measure what the runs' folders do not hold; what cannot be measured is said in `missing`.

    Args:
        deadline: of `time.monotonic`; what would take longer is left out.
        show: called with what is measured next.
    """
    able = sorted((run for run in runs if run.run.weights), key=lambda run: -(run.top_1 or 0))
    read: dict[str | None, MeasuredRun] = {}  # by kind, which is never None here
    for number, run in enumerate(able):
        if number < MAX_EVALUATED or run.kind not in read:
            show(f"Reading {run.run.folder.name}")
            run.load()
            if run.predictor and run.kind is not None:
                read.setdefault(run.kind, run)
    try:
        _measure_latency(runs, deadline, show)
    except (RuntimeError, UserError) as error:  # out of memory, say
        for run in able:
            run.run.missing.append(f"Latency: {one_line(error)[:300]}")
    for run in able:
        if run.kind in read and not run.predictor:  # the same network with another seed
            same = read[run.kind]
            run.layers, run.latency, run.is_gated = same.layers, same.latency, same.is_gated
    _evaluate(able[:MAX_EVALUATED], deadline, show)
    for run in able[MAX_EVALUATED:]:
        run.run.missing.append(f"Accuracy by class: of several runs, only the {MAX_EVALUATED} best are evaluated.")


def _measure_latency(runs: Sequence[MeasuredRun], deadline: float | None, show: Show) -> None:
    forms: dict[tuple, list[MeasuredRun]] = {}
    for run in runs:
        if run.form is not None:
            forms.setdefault(run.form, []).append(run)
    networks: dict[str, nn.Module] = {}
    sizes: dict[str, tuple[int, int, int]] = {}
    keys: dict[tuple, tuple[str, str | None]] = {}
    for number, (form, own) in enumerate(forms.items()):
        predictor = own[0].predictor
        assert predictor is not None
        name = f"network {number + 1}"
        networks[name], sizes[name] = predictor.model, predictor.recipe.data.input_size
        keys[form] = name, _add_baseline(predictor, networks, sizes)
    if not networks:
        return
    largest = max(run.predictor.recipe.data.batch_size for run in runs if run.predictor)
    batches = (1, min(largest, MAX_BATCH)) if len(forms) == 1 and largest > 1 else (1,)
    times = measure_latency(networks, sizes, batches, deadline, lambda name: show(f"Timing {name.split(' {')[0]}"))
    for form, own in forms.items():
        name, dense = keys[form]
        rows = [
            {"batch": batch, "deployed": times[name][batch], "dense": times[dense][batch] if dense else None}
            for batch in times[name]
        ]
        for run in own:
            run.latency = rows
            if len(rows) < len(batches):
                run.run.missing.append("Latency of a batch: left out, it would have taken too long.")


def _add_baseline(
    predictor: Predictor, networks: dict[str, nn.Module], sizes: dict[str, tuple[int, int, int]]
) -> str | None:
    """Add the dense baseline of a network, unless it is there: its name; None if the network is dense itself."""
    model, size, classes = predictor.recipe.model, predictor.recipe.data.input_size, len(predictor.classes)
    if model.dense == model:
        return None
    name = f"baseline {model.dense.model_dump_json(exclude=GATES)} {size} {classes}"  # which has no gates
    if name not in networks:
        networks[name], sizes[name] = build_model(model.dense, classes, size), size
    return name


def _evaluate(runs: Sequence[MeasuredRun], deadline: float | None, show: Show) -> None:
    for run in runs:
        if run.predictor is None:
            continue
        notify = partial(_show_batches, show, run.run.folder.name)
        try:
            images = ValidationImages(run.predictor, deadline, notify)
            run.evaluation = images.evaluate()
            if run.is_gated and run.gates is None:
                run.gates = images.gate_statistics()
        except (RuntimeError, UserError, ValueError) as error:
            what = "What the gates select" if run.evaluation else "Accuracy by class, confusions and mistakes"
            run.run.missing.append(f"{what}: {one_line(error)[:300]}.")


def _show_batches(show: Show, name: str, done: int, batches: int) -> None:
    show(f"Evaluating {name}: {done} of {batches} batches")
