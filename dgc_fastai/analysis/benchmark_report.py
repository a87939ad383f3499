"""A benchmark in the terminal: its progress bar and its tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .benchmark_text import (
    bottleneck_sentence,
    decimal_places,
    machine_line,
    measurement_title,
    noise_and_digits,
    plural,
    ratio_range,
    rounded,
)

__all__ = ["progress_bar", "show_benchmark"]


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[str, str], None]]:
    """A progress bar of `total` steps on a terminal; call what it yields at the start of each step, with two titles.

    It is redrawn in these calls only: a bar that refreshes itself would take time from what is measured.
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
    """Print the tables of a benchmark, as `benchmark.json` holds it, rounded to the digits that are above the noise."""
    if report["measurements"]:
        console.print(_times_table(report))
        for line in _speedup_lines(report):
            console.print(line, highlight=False)
        console.print(f"{machine_line(report)}.", highlight=False)
        console.print(_noise_line(report), highlight=False)
        console.print(f"[dim]{_legend(report['rounds'])}[/]", highlight=False)
    if "data" in report:
        _show_data(console, report)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _times_table(report: dict[str, Any]) -> Table:
    table = _table("ms", "x dense", "range", "peak MiB", "x dense")
    for measurement in report["measurements"]:
        rows = measurement["variants"]
        noise, digits = noise_and_digits(rows)
        decimals = decimal_places(rows[0]["median_ms"], noise)
        table.add_row(f"[bold]{measurement_title(measurement)}[/]")
        for row in rows:
            cells = [rounded(row["median_ms"], decimals), f"{row['ratio']['median']:.{digits}f}"]
            cells.append(ratio_range(row, digits) if row is not rows[0] else "")
            if row["peak_bytes"] is not None:
                mebibytes, share = row["peak_bytes"] / 2**20, row["peak_bytes"] / rows[0]["peak_bytes"]
                cells += [rounded(mebibytes, decimal_places(mebibytes, 0)), f"{share:.2f}"]
            table.add_row(f"  {row['name']}", *cells)
        table.add_section()
    return table


def _speedup_lines(report: dict[str, Any]) -> Iterator[str]:
    for measurement in report["measurements"]:
        if "speedup" in measurement:
            found, title = measurement["speedup"], measurement_title(measurement)
            _, digits = noise_and_digits(measurement["variants"])
            yield (
                f"{title}: {found['of']} is [bold]{found['median']:.{digits}f} x[/] as fast as "
                f"{found['over']}, the fastest dense form ({found['min']:.{digits}f} to {found['max']:.{digits}f})."
            )


def _noise_line(report: dict[str, Any]) -> str:
    noises = [f"{ratio_range(one['variants'][-1], 2)} ({measurement_title(one)})" for one in report["measurements"]]
    return f"Noise, the dense baseline against itself: {', '.join(noises)}."


def _legend(rounds: int) -> str:
    return (
        f"Medians of {plural(rounds, 'interleaved round')}, and the range of the ratios. sgc: static group "
        "convolutions. reference: the gated network by the authors' method (reference backend), at training progress 0 "
        "(gates open) to 1 (closed). ours: the same network with the backends that are selected here. deployed: the "
        "network that `deploy` returns. compiled: by torch.compile, with frozen weights. Peak: memory allocated in a "
        "step, in addition to weights and optimizer state."
    )


def _show_data(console: Console, report: dict[str, Any]) -> None:
    data = report["data"]
    table = _table("images/s", "range")
    for row in data["sources"]:
        decimals = decimal_places(row["median"], row["max"] / row["min"] - 1)
        table.add_row(row["name"], rounded(row["median"], decimals), f"{row['min']:,.3g} to {row['max']:,.3g}")
    console.print(table)
    console.print(f"{machine_line(report)}.", highlight=False)
    console.print(
        f"[dim]Medians of {plural(report['rounds'], 'interleaved round')}, batches of {data['batch']}; each measured "
        "by itself, with the files in the system's cache. On a CPU, network and workers share its cores.[/]",
        highlight=False,
    )
    console.print(bottleneck_sentence(data), highlight=False)
