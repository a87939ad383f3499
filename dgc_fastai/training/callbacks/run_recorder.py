"""Recording a run in its folder."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.torch_core import get_model

from ...models.checkpoints import save_checkpoint
from ...models.cost import Budget
from ...recipe.schema import Recipe
from ...utils import launch
from ...utils.files import write_atomically, write_table
from ..curves import draw_curves
from ..diagnosis import Findings, problems
from ..run_environment import run_environment
from .order import RUN_RECORDER


class RunRecorder(Callback):
    """Keeps a row of numbers for each epoch, and the run's folder up to date.

    After every epoch it writes the history, the summary, and the last and best
    weights; the curves from time to time, and at the end. All processes keep the rows; the main one writes.

    The best weights are those of the highest top-1 among the epochs with the most inactive channels: a network whose
    gates are still open is a different, costlier one.

    Args:
        folder: an existing folder.
        recipe: the run's recipe; weights carry it and the class names in their metadata.
        classes: the class names.
        cost: of the network.
        findings: of the callback Diagnosis, which fills them.
        starts_from: the weights that the network started from, if any.
    """

    order = RUN_RECORDER
    state_key = "run"

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        classes: Sequence[str],
        cost: Budget,
        findings: Findings,
        starts_from: str | None = None,
    ):
        self.folder, self.recipe, self.findings = folder, recipe, findings
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.drawn_at, self.drawing_time = self.started, 1.0  # a first guess
        self.classes = list(classes)
        self.metadata = {"recipe": recipe.to_yaml(), "classes": json.dumps(self.classes), "format": "pt"}
        self.summary: dict[str, Any] = {
            "name": recipe.name,
            "starts_from": starts_from,
            "macs": cost.macs,
            "macs_dense": cost.macs_dense,
            "operations": cost.operations,
            "parameters": cost.parameters,
        }

    def before_fit(self):
        if launch.is_main_process():
            self.summary["environment"] = run_environment(torch.device(self.dls.device))

    def before_epoch(self):
        self.started = time.monotonic()

    def after_epoch(self):
        names = self.recorder.metric_names[:-1]  # without the time, which is text
        row = dict(zip(names, self.recorder.log))
        row["epoch"] = self.epoch + 1
        row["seconds"] = round(time.monotonic() - self.started, 3)
        self.rows.append(row)
        if launch.is_main_process():
            self._write(row)
        self.started = time.monotonic()  # of the next epoch, whose state may be saved now

    def after_fit(self):
        if self.rows and launch.is_main_process():
            self._draw()

    def state_dict(self) -> dict[str, Any]:
        began = {"starts_from": self.summary["starts_from"]}
        return {"rows": self.rows, "elapsed": time.monotonic() - self.started, **began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows[:] = state["rows"]  # in place: the display shows this list
        self.started = time.monotonic() - state["elapsed"]
        self.summary["starts_from"] = state["starts_from"]

    def _write(self, row: dict[str, Any]) -> None:
        write_table(self.folder / "history.csv", self.rows)
        if time.monotonic() - self.drawn_at > 20 * self.drawing_time:  # drawing takes at most 5 % of short epochs
            self._draw()
        average = getattr(self, "average_weights", None)
        network = average.averaged if average else get_model(self.model)
        # The later one of equals, as the authors do.
        best = max(self.rows, key=lambda row: (row["inactive"], row["top_1"], row["epoch"]))
        names = ["last.safetensors"]
        if best is row:
            names.append("best.safetensors")
        if self.recipe.log.keep_every and row["epoch"] % self.recipe.log.keep_every == 0:
            names.append(f"epoch_{row['epoch']:04d}.safetensors")
        for name in names:
            save_checkpoint(network, self.folder / name, self.metadata)
        self.summary.update(
            epochs=row["epoch"],
            seconds=round(sum(row["seconds"] for row in self.rows), 3),
            best=best,
            last=row,
            problems=problems(self.rows, self.findings, self.recipe, self.classes),
        )
        write_atomically(self.folder / "summary.json", json.dumps(self.summary, indent=2) + "\n")

    def _draw(self) -> None:
        began = time.monotonic()
        write_atomically(self.folder / "curves.png", draw_curves(self.rows, self.recipe.name))
        self.drawn_at = time.monotonic()
        self.drawing_time = self.drawn_at - began
