"""The plot of a run in the terminal."""

import io

import pytest
from rich.console import Console
from safetensors.torch import load_file

from dgc_fastai import load_recipe
from dgc_fastai.training.callbacks.live_plot import LivePlot
from dgc_fastai.training.run import TrainingRun
from helpers import QUICKSTART
from helpers.golden import equal_states
from helpers.runs import TINY, history, start


def rows(*values):
    return [
        {"epoch": n, "train_loss": value, "valid_loss": value, "top_1": 1 - value, "top_5": 1.0}
        for n, value in enumerate(values, 1)
    ]


def terminal(width=80, height=30):
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=height)


def drawn(plot, console=None):
    console = console or terminal()
    console.print(plot)
    return console.file.getvalue().rstrip("\n")


def dots(lines, column):
    """The rows, from the top, of the dots in a column of characters."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    return [
        4 * number + row
        for number, line in enumerate(lines)
        for row, pair in enumerate(bits)
        if line[column] > "\u2800" and ord(line[column]) & sum(pair)
    ]


def test_a_falling_line_goes_from_corner_to_corner():
    _, title, *lines = drawn(LivePlot(rows(1.0, 0.0), 2)).splitlines()
    assert title.split()[:5] == ["loss", "valid", "0.000", "train", "0.000"]
    assert lines[0].startswith(" 1.000 ") and lines[5].startswith(" 0.000 ") and len(lines) == 6
    panel = [line[7:38] for line in lines]
    assert dots(panel, 0)[0] == 0 and dots(panel, 30)[-1] == 23
    means = [sum(dots(panel, column)) / len(dots(panel, column)) for column in range(31)]
    assert means == sorted(means)


def test_the_axis_is_the_whole_run():
    *_, lines = [drawn(LivePlot(rows(1.0, 0.0), 11)).splitlines()[2:]]
    panel = [line[7:38].ljust(31) for line in lines]
    assert dots(panel, 0) and not any(dots(panel, column) for column in range(5, 31))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_too_long(width):
    lines = drawn(LivePlot(rows(123.4, 0.00123, 1e9), 30), terminal(width)).splitlines()
    assert len(lines) == 8 and all(len(line) <= width for line in lines)


@pytest.mark.parametrize("values", [(0.5, 0.5), (float("nan"), 1.0), (float("inf"), float("nan"))])
def test_any_numbers_can_be_drawn(values):
    assert len(drawn(LivePlot(rows(*values), 3)).splitlines()) == 8


def test_there_is_none_without_room():
    plot = LivePlot(rows(1.0, 0.5), 2)
    latin = Console(file=io.TextIOWrapper(io.BytesIO(), "latin-1"), force_terminal=True, width=80, height=30)
    latin.print(plot)
    latin.file.seek(0)
    assert not latin.file.read().strip()
    assert not drawn(plot, terminal(width=59)) and not drawn(plot, terminal(height=21))
    assert not drawn(LivePlot(rows(1.0), 2)) and drawn(plot)


def test_it_is_drawn_once_an_epoch(monkeypatch):
    numbers = rows(1.0, 0.5)
    plot, calls, draw = LivePlot(numbers, 9), [], LivePlot._draw
    monkeypatch.setattr(LivePlot, "_draw", lambda *arguments: calls.append(1) or draw(*arguments))
    for _ in range(5):
        drawn(plot)
    assert len(calls) == 1
    numbers += rows(0.2)
    drawn(plot)
    assert len(calls) == 2


def test_a_terminal_changes_no_number(tmp_path):
    plain, _ = start([f"output={tmp_path}/plain"])
    console = terminal()
    shown = TrainingRun(load_recipe(QUICKSTART, [*TINY, f"output={tmp_path}/shown"])).fit(console)
    assert "accuracy %  top-1" in console.file.getvalue()
    assert history(plain) == history(shown)
    weights = [load_file(folder / "last.safetensors") for folder in (plain, shown)]
    assert equal_states(*weights)
