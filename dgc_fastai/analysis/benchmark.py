"""Benchmark of a recipe on this machine: its network's training step, peak memory and inference, compared with its
baselines and with the authors' method, and its data pipeline."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..ops.device import device_wait, resolve, select_device
from ..recipe.schema import Data, Recipe
from ..utils.errors import UserError
from ..utils.files import write_atomically
from .benchmark_figure import draw_benchmark
from .benchmark_plan import BASELINE, HALF_CLOSED, plan_benchmark, plan_data, step_name
from .benchmark_report import progress_bar
from .throughput import Source, find_bottleneck, measure_rates
from .timing import Measurement, describe_machine, measure_times, peak_memory, spread, summarize

__all__ = ["benchmark", "benchmark_folder", "plan_benchmark", "plan_data"]

Show = Callable[[str, str], None]


def benchmark(
    recipe: Recipe,
    plan: Sequence[Measurement],
    folder: Path,
    rounds: int,
    console: Console,
    sources: Sequence[Source] = (),
) -> dict[str, Any]:
    """Measure what `plan_benchmark` and `plan_data` returned; write `benchmark.json` and `benchmark.png` to a folder.

    The JSON file is written after every measurement, so that an interruption loses only the one that is running.

    Returns:
        The content of the JSON file: the machine, the recipe, all times.
    """
    device = select_device(recipe.device)
    recipe = resolve(recipe, device)
    report: dict[str, Any] = {
        "name": recipe.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_machine(device),
        "rounds": rounds,
        "input": recipe.data.input_size,
        "recipe": recipe.model_dump(),
        "measurements": [],
    }

    def save() -> None:
        write_atomically(folder / "benchmark.json", json.dumps(report, indent=2) + "\n")

    calls = sum(len(one.variants) * (rounds + 1 + one.with_memory) for one in plan)
    try:
        with progress_bar(console, calls + len(sources) * (rounds + 1)) as show:
            for measurement in plan:
                report["measurements"].append(_measure(measurement, rounds, device, show))
                save()
            if sources:
                report["data"] = _measure_data(recipe.data, sources, rounds, show)
                save()
    finally:
        with suppress(OSError):
            folder.rmdir()  # succeeds only if the folder is empty: interrupted in the first measurement
    write_atomically(folder / "benchmark.png", draw_benchmark(report))
    return report


def _measure(measurement: Measurement, rounds: int, device: torch.device, show: Show) -> dict[str, Any]:
    what, batch, variants, with_memory = measurement
    notify = partial(show, f"{what}, batch {batch}")
    times = measure_times(variants, rounds, device_wait(device), notify)
    memory = {}
    for variant in variants if with_memory else ():
        notify(f"{variant.name}, memory")
        with variant.setting():
            memory[variant.name] = peak_memory(variant.call, device)
    rows = summarize(times, memory)
    return {"what": what, "batch": batch, "variants": rows} | speedup(rows)


def _measure_data(data: Data, sources: Sequence[Source], rounds: int, show: Show) -> dict[str, Any]:
    rows = measure_rates(sources, rounds, partial(show, "images per second"))
    workers = data.workers if data.is_image_files else 0  # a small set is in the device's memory
    found = find_bottleneck(rows, step_name(HALF_CLOSED), workers)
    return {"workers": workers, "batch": data.batch_size, "sources": rows} | found


def speedup(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speedup of the gated network's fastest deployed form over the fastest dense form; {} if one is missing."""

    def fastest(kind: str) -> dict[str, Any] | None:
        forms = (row for row in rows if row["name"].split()[0] == kind)
        return min(forms, key=lambda row: row["median_ms"], default=None)

    dense, ours = fastest(BASELINE), fastest("deployed")
    if dense is None or ours is None:
        return {}
    ratios = [one / other for one, other in zip(dense["ms"], ours["ms"])]
    return {"speedup": {"of": ours["name"], "over": dense["name"], **spread(ratios)}}


def benchmark_folder(recipe: Recipe, out: Path | None = None) -> Path:
    """Make the folder of a benchmark: `out`, or one below the recipe's `output` named for the recipe and the time.

    Raises:
        UserError: the folder cannot be made or is not writable.
    """
    folder = out or recipe.runs / f"benchmark-{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    key = "--out" if out else "output"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot make the folder {folder}: {error.strerror}; name another one") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} is not writable; choose another folder")
    return folder
