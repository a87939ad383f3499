"""Run folders -> a page."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ...utils.files import write_atomically
from ...utils.invocation import display_path, program
from ..compression_text import page_data as compression_text
from .collect import StoredRun, find_runs, read_stored_run, unstarted_runs
from .groups import SEED, common_differences, group_runs, label_runs, pareto_front, recipe_value
from .latency import describe_here
from .measure import MeasuredRun, measure_runs
from .page import render

__all__ = ["write_report"]

MAX_USAGE = 60_000  # numbers of channel use by class, in a page
BASELINES = "macs_dense", "macs", "operations", "parameters"


def write_report(
    paths: Sequence[Path], out: Path | None = None, console: Console | None = None, seconds: float | None = None
) -> Path:
    """Write one HTML page about a run, about several, or about all in a folder such as a sweep's, and return its path.

    The page needs no network and makes no request. What the folders lack, it says.

    Args:
        paths: run folders, or folders with run folders in them.
        out: the file to write; by default `report.html` in the only path, or in the working folder for several.
        console: where to show the progress.
        seconds: leave out measurements that would take longer.

    Raises:
        UserError: a path is not a folder, or has no runs in it.
        WriteError: the page cannot be written.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    console = console or Console(quiet=True)
    folders = find_runs(paths)
    out = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    with console.status("Reading the runs") as status:
        runs = [MeasuredRun(read_stored_run(folder)) for folder in folders]
        measure_runs(runs, deadline, status.update)
        status.update("Writing the page")
        title = folders[0].resolve().name if len(folders) == 1 else _title(paths)
        notes = [f"{_names(names)} not started yet." for path in paths if (names := unstarted_runs(path))]
        write_atomically(out, render(page_data(title, runs, notes)))
    return out


def _title(paths: Sequence[Path]) -> str:
    return paths[0].resolve().name if len(paths) == 1 else f"{len(paths)} runs"


def _names(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} planned {'run was' if len(names) == 1 else 'runs were'} ({listed})"


def page_data(title: str, measured: Sequence[MeasuredRun], notes: Sequence[str] = ()) -> dict[str, Any]:
    """What a page shows, as JSON can hold it.

    Args:
        notes: sentences about what is missing as a whole.
    """
    stored = [one.run for one in measured]
    keys = common_differences(stored)
    labels = label_runs(stored, keys)
    runs = [
        _run_data(number, one, label, {key: recipe_value(one.run, key) for key in keys})
        for number, (one, label) in enumerate(zip(measured, labels))
    ]
    _shorten(runs)
    groups = group_runs(runs)
    return {
        "title": title,
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "program": program(),
        "machine": describe_here(),
        "keys": keys,
        "notes": list(notes),
        "runs": runs,
        "groups": groups,
        "fronts": {cost: pareto_front(groups, cost) for cost in ("macs", "ms")},
    }


def _run_data(number: int, measured: MeasuredRun, label: str, values: dict[str, str]) -> dict[str, Any]:
    run = measured.run
    compression = _compression(run)
    done, planned = run.epochs
    latency = measured.latency or []
    one_image = next((row for row in latency if row["batch"] == 1), None)
    missing = list(run.missing)
    if measured.is_gated and not (measured.gates and measured.gates.get("controls")):
        what = "Accuracy with the gates of another image" if measured.gates else "What the gates select"
        missing.append(f"{what}: `{program()} gates {display_path(run.folder)}` measures it.")
    return {
        "id": number,
        "label": label,
        "folder": display_path(run.folder),
        "name": run.folder.resolve().name,
        "short": run.folder.resolve().name,
        "state": run.state,
        "epochs": [done, planned],
        "seed": recipe_value(run, SEED),
        "values": values,
        "top_1": measured.top_1,
        "macs": run.summary.get("macs"),
        "ms": one_image["deployed"]["median"] if one_image else None,
        "dense_ms": one_image["dense"]["median"] if one_image and one_image["dense"] else None,
        "summary": run.summary,
        "history": _columns(run),
        "phases": [planned / 12, planned * 3 / 4] if measured.is_gated and planned else None,
        "layers": measured.layers,
        "latency": latency,
        "evaluation": measured.evaluation,
        "gates": _small_gates(measured.gates),
        "compression": compression,
        "is_gated": measured.is_gated,
        "arch": run.recipe.model.arch if run.recipe else None,
        "recipe": run.recipe_text,
        "missing": missing,
    }


def _compression(run: StoredRun) -> dict[str, Any] | None:
    found = run.summary.get("compression")
    try:
        return compression_text(found) if found else None
    except (AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError):
        run.missing.append("Before and after: summary.json holds it in a form that this version cannot read.")
        return None


def _shorten(runs: Sequence[dict[str, Any]]) -> None:
    """Names without the time at which a run began, unless two are then the same."""
    short = [re.sub(r"(?<=.)-\d{8}-\d{6}(-\d+)?$", "", run["name"]) for run in runs]
    if len(set(short)) == len(short):
        for run, name in zip(runs, short):
            run["short"] = name


def _columns(run: StoredRun) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in run.history for name in row)
    return {name: [row.get(name) for row in run.history] for name in names}


def _small_gates(gates: dict[str, Any] | None) -> dict[str, Any] | None:
    """Gate statistics without what the page does not show.

    The use of channels is the mean over heads; `inputs` counts those of single heads that are kept for no, for some and
    for all images.
    """
    if gates is None:
        return None
    layers = []
    size = 0
    for layer in gates["layers"]:
        kept = {name: value for name, value in layer.items() if name not in ("by_head", "usage", "usage_by_class")}
        kept["usage"] = _mean_over_heads(layer.get("usage"))
        never, always = (sum(layer["by_head"][key]) for key in ("never_kept", "always_kept"))
        some = layer["heads"] * layer["channels"] - never - always
        kept["inputs"] = {"never": never, "some": some, "always": always}
        by_class = [_mean_over_heads(heads) for heads in layer.get("usage_by_class") or []]
        size += sum(map(len, by_class))
        kept["usage_by_class"] = by_class if by_class and size <= MAX_USAGE else None
        layers.append(kept)
    return {**gates, "layers": layers}


def _mean_over_heads(heads: list[list[float]] | None) -> list[float]:
    return [round(sum(column) / len(column), 3) for column in zip(*heads or [])]
