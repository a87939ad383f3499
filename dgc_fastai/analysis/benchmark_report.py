"""A benchmark as tables and as a picture."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..utils.figures import to_png

# The colour of a variant, by the first word of its name.
BAR_COLORS = {
    "dense": "0.45",
    "sgc": "tab:green",
    "reference": "tab:orange",
    "ours": "tab:blue",
    "deployed": "tab:purple",
}

DATA_COLOR = "tab:olive"


@contextmanager
def measuring_bar(console: Console, total: int) -> Iterator[Callable[[str, str], None]]:
    """A bar of `total` steps on a terminal; what it yields is called at the beginning of each, with two titles.

    It is redrawn then only: a bar that moves while a clock runs would be on the clock, too.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )
    with bar:
        task = bar.add_task("", total=total, completed=-1)

        def show(whole: str, part: str) -> None:
            bar.update(task, description=f"{whole}: {part}", advance=1, refresh=True)

        yield show


def show_benchmark(console: Console, report: dict[str, Any]) -> None:
    """Print the tables of a benchmark, as `benchmark.json` holds it, with no more digits than its noise leaves."""
    if report["measurements"]:
        _show_measurements(console, report)
    if "data" in report:
        _show_data(console, report)


def _show_data(console: Console, report: dict[str, Any]) -> None:
    data = report["data"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("images/s", "range"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in data["sources"]:
        decimals = _decimals(row["median"], row["max"] / row["min"] - 1)
        table.add_row(row["name"], *(_rounded(row["median"], decimals), f"{row['min']:,.3g} to {row['max']:,.3g}"))
    console.print(table)
    console.print(f"{_machine_line(report)}.", highlight=False)
    console.print(
        f"[dim]Medians of {_plural(report['rounds'], 'interleaved round')}, batches of {data['batch']}; each by "
        "itself, the files in the system's cache. On a CPU, network and workers share its cores.[/]",
        highlight=False,
    )
    console.print(_data_verdict(data), highlight=False)


def _data_verdict(data: dict[str, Any]) -> str:
    limits = data["limit"] == "data"
    remedy = f"; {data['enough']} would be enough" if limits and data["enough"] else ""
    return (
        f"The network takes {data['taken']:,.3g} images/s, the data gives {data['given']:,.3g} with "
        f"{_plural(data['workers'], 'worker')}: the data {'is' if limits else 'is not'} what limits{remedy}."
    )


def _show_measurements(console: Console, report: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("ms", "x dense", "range", "peak MiB", "x dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    noises = []
    for measurement in report["measurements"]:
        title, rows = _measurement_title(measurement), measurement["variants"]
        noise, digits = _noise(rows)
        decimals = _decimals(rows[0]["median_ms"], noise)
        noises.append(f"{_range(rows[-1], 2)} ({title})")
        table.add_row(f"[bold]{title}[/]")
        for row in rows:
            cells = [_rounded(row["median_ms"], decimals), f"{row['ratio']['median']:.{digits}f}"]
            cells.append(_range(row, digits) if row is not rows[0] else "")
            if row["peak_bytes"] is not None:
                mebibytes, share = (row["peak_bytes"] / one for one in (2**20, rows[0]["peak_bytes"]))
                cells += [_rounded(mebibytes, _decimals(mebibytes, 0)), f"{share:.2f}"]
            table.add_row(f"  {row['name']}", *cells)
        table.add_section()
    console.print(table)
    for measurement in report["measurements"]:
        if "speedup" in measurement:
            found, title = measurement["speedup"], _measurement_title(measurement)
            _, digits = _noise(measurement["variants"])
            console.print(
                f"{title}: {found['of']} is [bold]{found['median']:.{digits}f} x[/] as fast as {found['over']}, the "
                f"fastest dense form ({found['min']:.{digits}f} to {found['max']:.{digits}f}).",
                highlight=False,
            )
    console.print(f"{_machine_line(report)}.", highlight=False)
    console.print(f"Noise, the dense twin against itself: {', '.join(noises)}.", highlight=False)
    console.print(
        f"[dim]Medians of {_plural(report['rounds'], 'interleaved round')}, and the range of the ratios. Reference: "
        "the gated network in the authors' formulation, at training progress 0 (gates open) to 1 (closed); ours: the "
        "same network as it is here; deployed: what `deploy` makes of it; compiled: by torch.compile, weights frozen. "
        "Peak: what a step allocates at most, beside weights and optimiser state.[/]",
        highlight=False,
    )


def draw_benchmark(report: dict[str, Any]) -> bytes:
    """A PNG of a benchmark: times and peak memory as shares of the dense twin's, or images a second of the data.

    Whiskers go from least to most.
    """
    if not report["measurements"]:
        return _draw_data(report)
    training = [one for one in report["measurements"] if one["what"] == "training step"]
    inference = [one for one in report["measurements"] if one["what"] != "training step"]
    rows = [["time", "memory"]] * len(training) + [["one", "many" if len(inference) > 1 else "one"]] * bool(inference)
    heights = [len(one["variants"]) for one in (*training, *inference[:1])]
    figure = Figure(figsize=(10, 0.9 + 0.37 * sum(heights) + 1.1 * len(heights)), layout="constrained")
    figure.suptitle(_benchmark_title(report), fontsize="medium")
    panels = figure.subplot_mosaic(rows, height_ratios=heights)
    for measurement in training:
        _draw_times(panels["time"], measurement)
        peaks = [row["peak_bytes"] for row in measurement["variants"]]
        if None in peaks:
            panels["memory"].set_axis_off()  # not counted on this device
        else:
            shares = [peak / peaks[0] for peak in peaks]
            _draw_bars(
                panels["memory"], measurement["variants"], shares, 2, f"peak memory: {_measurement_title(measurement)}"
            )
    for name, measurement in zip(("one", "many"), inference):
        _draw_times(panels[name], measurement)
    band = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(*band, loc="outside lower center", fontsize="small", frameon=False)
    return to_png(figure)


def _draw_data(report: dict[str, Any]) -> bytes:
    data, rows = report["data"], report["data"]["sources"]
    figure = Figure(figsize=(10, 1.9 + 0.37 * len(rows)), layout="constrained")
    figure.suptitle(_benchmark_title(report), fontsize="medium")
    axes = figure.subplots()
    rates = [row["median"] for row in rows]
    whiskers = [[abs(row[end] - row["median"]) for row in rows] for end in ("min", "max")]
    names = [row["name"] for row in rows]
    colors = [BAR_COLORS.get(name.partition(", ")[2].split()[0], DATA_COLOR) for name in names]
    axes.barh(range(len(rows)), rates, color=colors, height=0.7, xerr=whiskers, error_kw={"capsize": 3})
    for place, row in enumerate(rows):
        axes.annotate(
            f"{row['median']:,.3g}", (row["max"], place), (6, 0), textcoords="offset points", va="center",
            fontsize="small",
        )  # fmt: skip
    axes.margins(x=0.08)
    axes.axvline(data["taken"], color="0.25", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_title(_data_verdict(data), fontsize="medium")
    axes.set_xlabel(f"images/s, batches of {data['batch']}; dashed: what the network takes half way")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return to_png(figure)


def _benchmark_title(report: dict[str, Any]) -> str:
    return f"{report['name']} ({report['recipe']['model']['arch']})\n{_machine_line(report)}"


def _draw_times(axes: Axes, measurement: dict[str, Any]) -> None:
    ratios = [row["ratio"] for row in measurement["variants"]]
    label = (
        "grey band: the dense twin against itself, that is, noise; whiskers: least and most of all rounds\n"
        "at 0, 0.5, 1: training progress, from open gates to closed ones; reference: the authors' formulation"
    )
    axes.axvspan(ratios[-1]["min"], ratios[-1]["max"], color="0.85", zorder=0, label=label)
    medians = [ratio["median"] for ratio in ratios]
    whiskers = [[abs(ratio[end] - ratio["median"]) for ratio in ratios] for end in ("min", "max")]
    _, digits = _noise(measurement["variants"])
    _draw_bars(axes, measurement["variants"], medians, digits, f"time: {_measurement_title(measurement)}", whiskers)


def _draw_bars(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    values: Sequence[float],
    digits: int,
    title: str,
    whiskers: Optional[list[list[float]]] = None,
) -> None:
    names, places = [row["name"] for row in rows], range(len(rows))
    colors = [BAR_COLORS[name.split()[0]] for name in names]
    axes.barh(places, values, color=colors, height=0.7, xerr=whiskers, error_kw={"capsize": 3, "ecolor": "0.25"})
    for place, value in zip(places, values):
        axes.annotate(
            f"{value:.{digits}f}", (0, place), (4, 0), textcoords="offset points", va="center", color="white",
            fontsize="small",
        )  # fmt: skip
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.axvline(1, color="0.25", linestyle="--", linewidth=1)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("x dense")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _machine_line(report: dict[str, Any]) -> str:
    machine = report["machine"]
    threads = f", {_plural(machine['threads'], 'thread')}" if machine["device"] == "cpu" else ""
    train = report["recipe"]["train"]
    layout = "channels last" if train["channels_last"] else "channels first"
    mode = "compiled" if train["compile"] else "eager"
    return f"{machine['processor']}{threads}, torch {machine['torch']}, {train['precision']}, {layout}, {mode}"


def _measurement_title(measurement: dict[str, Any]) -> str:
    return f"{measurement['what']}, {_plural(measurement['batch'], 'image')}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _noise(rows: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """How far from 1 the ratio of the baseline to itself, the last row, gets, and the decimals that this leaves."""
    noise = max(abs(rows[-1]["ratio"][end] - 1) for end in ("min", "max"))
    return noise, 2 if noise < 0.1 else 1


def _range(row: dict[str, Any], digits: int) -> str:
    return "{1:.{0}f} to {2:.{0}f}".format(digits, row["ratio"]["min"], row["ratio"]["max"])


def _decimals(value: float, noise: float) -> int:
    """How many a relative noise leaves of a value of one to three digits; negative where not even its ones are left."""
    if value <= 0:
        return 0
    first = -math.floor(math.log10(value))
    return min(first + 2, max(first, -math.floor(math.log10(value * noise)))) if noise else first + 2


def _rounded(value: float, decimals: int) -> str:
    return f"{round(value, decimals):,.{max(0, decimals)}f}"
