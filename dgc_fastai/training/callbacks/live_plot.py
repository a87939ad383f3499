"""Loss and accuracy of a run as a plot in the terminal."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

__all__ = ["LivePlot"]

MIN_WIDTH, MIN_HEIGHT = 60, 22  # of a terminal with room for it
ROWS, LABEL = 6, 6  # lines of a panel, and columns of its numbers
GAP = 4  # columns between the panels
BRAILLE = 0x2800
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of the left and the right column, from the top

# Heading, factor, and the curves of each panel: key of a row, name, style. The last one is drawn on top.
PANELS: tuple[tuple[str, float, tuple[tuple[str, str, str], ...]], ...] = (
    ("loss", 1, (("train_loss", "train", "bright_black"), ("valid_loss", "valid", "cyan"))),
    ("accuracy %", 100, (("top_5", "top-5", "bright_black"), ("top_1", "top-1", "cyan"))),
)


class LivePlot:
    """A renderable: nothing, where the terminal has no room or no such characters, or before two epochs are done.

    It is drawn once an epoch, however often it is rendered.

    Args:
        rows: the numbers of each epoch, which grow.
        epochs: of the run.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], epochs: int):
        self.rows, self.epochs = rows, epochs
        self._drawn: tuple[tuple[int, int], list[Text]] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, done = options.max_width, len(self.rows)
        has_braille = (console.encoding or "").lower().startswith("utf") and not options.legacy_windows
        if done < 2 or width < MIN_WIDTH or console.height < MIN_HEIGHT or not has_braille:
            return
        if self._drawn is None or self._drawn[0] != (done, width):
            self._drawn = (done, width), self._draw(list(self.rows[:done]), min(width, 120))
        yield from self._drawn[1]

    def _draw(self, rows: list[dict[str, Any]], width: int) -> list[Text]:
        panels = [_panel(rows, self.epochs, (width - GAP) // len(PANELS), *panel) for panel in PANELS]
        return [Text(), *(Text(" " * GAP).join(lines) for lines in zip(*panels))]


def _panel(
    rows: list[dict[str, Any]],
    epochs: int,
    width: int,
    heading: str,
    scale: float,
    curves: Sequence[tuple[str, str, str]],
) -> list[Text]:
    """A heading with the latest values that have room, and the curves, as lines of exactly `width` columns."""
    points = {key: _points(rows, key, scale) for key, _, _ in curves}
    values = [value for found in points.values() for _, value in found]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    high = high if high > low else low + 1
    columns = width - LABEL - 1
    masks = [[0] * columns for _ in range(ROWS)]
    styles = [[""] * columns for _ in range(ROWS)]
    for key, _, style in curves:
        _draw_line(points[key], epochs, low, high, masks, styles, style)
    title = Text(heading, style="bold")
    for key, name, style in reversed(curves):
        latest = f"  {name} {_short(points[key][-1][1])}" if points[key] else ""
        if len(title) + len(latest) <= width:
            title.append(latest, style=f"not bold {style}")
    lines = [title]
    for number, (row, own) in enumerate(zip(masks, styles)):
        label = _short(high) if number == 0 else _short(low) if number == ROWS - 1 else ""
        line = Text(label.rjust(LABEL) + " ", style="bright_black")
        for mask, style in zip(row, own):
            line.append(chr(BRAILLE + mask) if mask else " ", style=style)
        lines.append(line)
    for line in lines:
        line.truncate(width, pad=True)
    return lines


def _points(rows: list[dict[str, Any]], key: str, scale: float) -> list[tuple[int, float]]:
    """Epochs and values, without NaN and Inf."""
    found = [(row["epoch"], scale * row[key]) for row in rows if key in row]
    return [(epoch, value) for epoch, value in found if math.isfinite(value)]


def _draw_line(
    points: list[tuple[int, float]],
    epochs: int,
    low: float,
    high: float,
    masks: list[list[int]],
    styles: list[list[str]],
    style: str,
) -> None:
    """Set the dots of a curve: two columns of four dots in each character."""
    right, bottom = 2 * len(masks[0]) - 1, 4 * len(masks) - 1
    dots = [
        (round((epoch - 1) / max(1, epochs - 1) * right), round((high - value) / (high - low) * bottom))
        for epoch, value in points
    ]
    for (x, y), (next_x, next_y) in zip(dots, dots[1:] or dots):
        steps = max(abs(next_x - x), abs(next_y - y), 1)
        for step in range(steps + 1):
            column, row = round(x + (next_x - x) * step / steps), round(y + (next_y - y) * step / steps)
            masks[row // 4][column // 2] |= DOTS[column % 2][row % 4]
            styles[row // 4][column // 2] = style


def _short(value: float) -> str:
    """A number in at most six characters."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0e}"
