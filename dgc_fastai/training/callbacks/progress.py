"""Progress bars, a plot, and a line of numbers for each epoch."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastai.callback.core import Callback
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .live_plot import LivePlot
from .order import SHOW_ROW

HEARTBEAT = 60  # seconds between lines within an epoch, where there is no live bar


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


# Columns of the epoch table: the recorder's name, the heading, the format of a value.
COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("epoch", "epoch", str),
    ("train_loss", "train loss", "{:.4f}".format),
    ("valid_loss", "valid loss", "{:.4f}".format),
    ("top_1", "top-1", _percent),
    ("top_5", "top-5", _percent),
    ("inactive", "inactive", _percent),
    ("gate_penalty", "penalty", "{:.2f}".format),
    ("lr", "lr", "{:.2e}".format),
    ("seconds", "time", "{:.1f} s".format),
]


class _Bars(Progress):
    """Progress bars with a plot below them."""

    plot: LivePlot | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.plot is not None:
            yield self.plot


class TrainingDisplay(Callback):
    """Live bars and a plot on a terminal, plain lines elsewhere, and a line of numbers for each epoch.

    It replaces fastai's ProgressCallback. The numbers come from `rows`, which `RunRecorder` extends.

    Args:
        console: where to print.
        rows: a dictionary for each epoch, with the keys of `COLUMNS`; None to show bars only.
        print_every: batches between lines within an epoch; by default, one line a minute, or none where there is a
            live bar.
    """

    order = SHOW_ROW

    def __init__(self, console: Console, rows: list[dict[str, Any]] | None = None, print_every: int | None = None):
        self.console, self.rows, self.print_every = console, rows, print_every
        self.bars: _Bars | None = None

    def before_fit(self):
        if self.console.is_terminal:
            self.bars = _Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.whole = self.bars.add_task("training", total=None, note="", visible=self.rows is not None)
            self.part = self.bars.add_task("", total=None, note="")
            if self.rows is not None:
                self.bars.plot = LivePlot(self.rows, self.n_epoch)
            self.bars.start()
        if self.rows is not None:
            self._print([heading for _, heading, _ in COLUMNS], style="bold")

    def before_train(self):
        self._begin(f"epoch {self.epoch + 1} of {self.n_epoch}", len(self.dls.train))

    def before_validate(self):
        self._begin("validating", len(self.dl))

    def _begin(self, title: str, steps: int):
        self.title, self.steps, self.beat = title, steps, time.monotonic()
        if self.bars:
            self.bars.reset(self.part, description=title, total=steps, note="")

    def after_batch(self):
        done, now = self.iter + 1, time.monotonic()
        if self.bars:
            self.bars.update(self.part, completed=done)
            if self.training:
                before = self.epoch * self.steps
                self.bars.update(self.whole, total=self.n_epoch * self.steps, completed=before + done)
            if now - self.beat > 0.5:  # not at every step, because reading the loss waits for the device
                self.beat = now
                self.bars.update(self.part, note=f"loss {float(self.smooth_loss):.4f}" if self.training else "")
        if done % self.print_every == 0 if self.print_every else not self.bars and now - self.beat > HEARTBEAT:
            self.beat = now
            line = f"{self.title}: {done:,} of {self.steps:,} batches"
            line += f", loss {float(self.smooth_loss):.4f}" if self.training else ""
            self.console.print(line, highlight=False)

    def after_epoch(self):
        if self.rows:
            row = self.rows[-1]
            self._print([write(row[name]) if name in row else "" for name, _, write in COLUMNS])

    def after_fit(self):
        self.close()

    def close(self):
        """Remove the bars; also to be called after an interrupt, which fastai reports to no callback."""
        if self.bars:
            self.bars.stop()
            self.bars = None

    def _print(self, cells: Sequence[str], style: str = ""):
        widths = [max(len(heading) + 1, 8) for _, heading, _ in COLUMNS]
        line = " ".join(cell.rjust(width) for cell, width in zip(cells, widths))
        self.console.print(line, style=style, highlight=False, soft_wrap=True)
