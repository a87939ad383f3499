"""A benchmark as a figure."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..utils.figures import to_png
from .benchmark_text import bottleneck_sentence, machine_line, measurement_title, noise_and_digits

__all__ = ["draw_benchmark"]

# The color of a variant, by the first word of its name.
BAR_COLORS = {
    "dense": "0.45",
    "sgc": "tab:green",
    "reference": "tab:orange",
    "ours": "tab:blue",
    "deployed": "tab:purple",
}
DATA_COLOR = "tab:olive"


def draw_benchmark(report: dict[str, Any]) -> bytes:
    """A PNG of a benchmark: times and peak memory relative to the dense baseline, or images per second of the data.

    The whiskers show the smallest and the largest value of all rounds.
    """
    if not report["measurements"]:
        return _draw_data(report)
    training = [one for one in report["measurements"] if one["what"] == "training step"]
    inference = [one for one in report["measurements"] if one["what"] != "training step"]
    rows: list[list[Any]] = [["time", "memory"]] * len(training)
    rows += [["one", "many" if len(inference) > 1 else "one"]] * bool(inference)
    heights = [len(one["variants"]) for one in (*training, *inference[:1])]
    figure = Figure(figsize=(10, 0.9 + 0.37 * sum(heights) + 1.1 * len(heights)), layout="constrained")
    figure.suptitle(_title(report), fontsize="medium")
    panels = figure.subplot_mosaic(rows, height_ratios=heights)
    for measurement in training:
        _draw_times(panels["time"], measurement)
        _draw_memory(panels["memory"], measurement)
    for name, measurement in zip(("one", "many"), inference):
        _draw_times(panels[name], measurement)
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small", frameon=False)
    return to_png(figure)


def _draw_data(report: dict[str, Any]) -> bytes:
    data, rows = report["data"], report["data"]["sources"]
    figure = Figure(figsize=(10, 1.9 + 0.37 * len(rows)), layout="constrained")
    figure.suptitle(_title(report), fontsize="medium")
    axes = figure.subplots()
    rates = [row["median"] for row in rows]
    whiskers = [[abs(row[end] - row["median"]) for row in rows] for end in ("min", "max")]
    names = [row["name"] for row in rows]
    colors = [BAR_COLORS.get(name.partition(", ")[2].split()[0], DATA_COLOR) for name in names]
    axes.barh(range(len(rows)), rates, color=colors, height=0.7, xerr=whiskers, error_kw={"capsize": 3})
    for place, row in enumerate(rows):
        _annotate(axes, f"{row['median']:,.3g}", (row["max"], place), 6)
    axes.margins(x=0.08)
    axes.axvline(data["taken"], color="0.25", linestyle="--", linewidth=1)
    xlabel = f"images/s, batches of {data['batch']}; dashed: what the network can train on, gates half closed"
    _finish(axes, names, bottleneck_sentence(data), xlabel)
    return to_png(figure)


def _title(report: dict[str, Any]) -> str:
    return f"{report['name']} ({report['recipe']['model']['arch']})\n{machine_line(report)}"


def _draw_times(axes: Axes, measurement: dict[str, Any]) -> None:
    ratios = [row["ratio"] for row in measurement["variants"]]
    label = (
        "gray band: the dense baseline against itself, that is, noise; whiskers: smallest and largest of all rounds\n"
        "at 0, 0.5, 1: training progress, from open to closed gates; "
        "reference: the authors' method (reference backend)"
    )
    axes.axvspan(ratios[-1]["min"], ratios[-1]["max"], color="0.85", zorder=0, label=label)
    medians = [ratio["median"] for ratio in ratios]
    whiskers = [[abs(ratio[end] - ratio["median"]) for ratio in ratios] for end in ("min", "max")]
    _, digits = noise_and_digits(measurement["variants"])
    _draw_bars(axes, measurement["variants"], medians, digits, f"time: {measurement_title(measurement)}", whiskers)


def _draw_memory(axes: Axes, measurement: dict[str, Any]) -> None:
    peaks = [row["peak_bytes"] for row in measurement["variants"]]
    if None in peaks:
        axes.set_axis_off()  # not counted on this device
        return
    shares = [peak / peaks[0] for peak in peaks]
    _draw_bars(axes, measurement["variants"], shares, 2, f"peak memory: {measurement_title(measurement)}")


def _draw_bars(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    values: Sequence[float],
    digits: int,
    title: str,
    whiskers: list[list[float]] | None = None,
) -> None:
    names = [row["name"] for row in rows]
    colors = [BAR_COLORS[name.split()[0]] for name in names]
    error_style = {"capsize": 3, "ecolor": "0.25"}
    axes.barh(range(len(rows)), values, color=colors, height=0.7, xerr=whiskers, error_kw=error_style)
    for place, value in enumerate(values):
        _annotate(axes, f"{value:.{digits}f}", (0, place), 4, color="white")
    axes.axvline(1, color="0.25", linestyle="--", linewidth=1)
    _finish(axes, names, title, "x dense")


def _annotate(axes: Axes, text: str, point: tuple[float, float], offset: int, color: str = "black") -> None:
    axes.annotate(text, point, (offset, 0), textcoords="offset points", va="center", color=color, fontsize="small")


def _finish(axes: Axes, names: Sequence[str], title: str, xlabel: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
