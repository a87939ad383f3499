"""How a benchmark is shown: rounding, the figure, the progress bar."""

from io import StringIO

import pytest
from rich.console import Console

from dgc_fastai.analysis.benchmark_figure import draw_benchmark
from dgc_fastai.analysis.benchmark_report import progress_bar
from dgc_fastai.analysis.benchmark_text import decimal_places, rounded
from helpers.benchmarks import INFERENCE, TRAINING


@pytest.mark.parametrize(
    "value, noise, text",
    [(1234.0, 0.2, "1,200"), (1234.0, 0.05, "1,230"), (1234.0, 0.0, "1,230"), (12.34, 0.05, "12.3"),
     (12.34, 0.2, "12"), (0.1234, 0.05, "0.123"), (0.0, 0.1, "0"), (7.2, 9.0, "7"), (72.0, 0.5, "70"),
     (99.96, 0.001, "100.0")],
)  # fmt: skip
def test_no_more_digits_than_the_noise_leaves(value, noise, text):
    assert rounded(value, decimal_places(value, noise)) == text


def test_the_picture_takes_whatever_was_measured():
    def row(name, peak=1):
        return {"name": name, "median_ms": 1.0, "peak_bytes": peak, "ratio": {"median": 1.0, "min": 0.9, "max": 1.2}}

    for peak, batches in ((None, [1]), (1, [1, 8])):
        measured = [{"what": "training step", "batch": 8, "variants": [row(name, peak) for name in TRAINING]}]
        measured += [{"what": "inference", "batch": n, "variants": [row(n) for n in INFERENCE]} for n in batches]
        recipe = {
            "model": {"arch": "dgc_resnet18"},
            "train": {"precision": "bf16", "channels_last": True, "compile": True},
        }
        machine = {"processor": "GPU", "device": "cuda", "torch": "2"}
        for some in (measured, measured[:1], measured[1:]):
            report = {"name": "x", "measurements": some, "recipe": recipe, "machine": machine, "rounds": 1}
            assert draw_benchmark(report).startswith(b"\x89PNG")


def test_a_bar_on_a_terminal_moves_only_when_told():

    screen = StringIO()
    with progress_bar(Console(file=screen, force_terminal=True, width=100), 3) as show:
        for number in range(3):
            show("training step", f"variant {number}")
    assert all(f"training step: variant {number}" in screen.getvalue() for number in range(3))
    assert "0/3" in screen.getvalue() and "2/3" in screen.getvalue() and "4/3" not in screen.getvalue()
    with progress_bar(Console(file=(silent := StringIO()), force_terminal=False), 1) as show:
        show("training step", "dense")
    assert silent.getvalue().strip() == ""
