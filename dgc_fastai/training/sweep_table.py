"""The runs of a sweep as a table and a picture. Imports no torch."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..utils.figures import to_png
from ..utils.means import standard_error

__all__ = ["draw_sweep", "group_rows"]


def group_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of runs that differ in their seed only, as one: mean, standard error and number of the seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return [
        {
            "label": group,
            "top_1": statistics.fmean(row["top_1"] for row in own),
            "error": standard_error([row["top_1"] for row in own]),
            "seeds": len(own),
            "macs": own[0]["macs"],
            "macs_dense": own[0]["macs_dense"],
        }
        for group, own in groups.items()
    ]


def draw_sweep(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """A PNG of accuracy against multiply-accumulates: a point for each combination, with its standard error."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    groups = group_rows(rows)
    for row, marker in zip(groups, itertools.cycle("os^Dv<>P*X")):
        error = None if row["error"] is None else 100 * row["error"]
        axes.errorbar(
            row["macs"] / 1e6, 100 * row["top_1"], error, fmt=marker, markersize=8, capsize=4, label=row["label"]
        )
    dense = {row["macs_dense"] for row in groups}
    if len(dense) == 1:
        axes.axvline(dense.pop() / 1e6, color="0.6", linestyle="--", zorder=0, label="cost of the dense network")
    figure.legend(loc="outside right upper", fontsize="small")
    axes.set_title(title)
    axes.set_xlabel("multiply-accumulates of one image (millions)")
    axes.set_ylabel("top-1 of the best epoch (%)")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    return to_png(figure)
