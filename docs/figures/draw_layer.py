"""Draw the README's picture of a DGC layer: `python docs/figures/draw_layer.py [FILE.svg]`.

What it shows is computed, not sketched: a layer with 8 input channels, 2 heads and 8 output channels is run on eight
edge maps of a photograph. Gates, selection, and feature maps are those of that layer.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from sklearn.datasets import load_sample_image

from dgc_fastai import DynamicGroupConv2d, set_progress
from dgc_fastai.ops.gates import head_gates

CHANNELS, HEADS, SEED = 8, 2, 11
HEAD_COLORS = "#1f6fb4", "#d9722a"
INK, FAINT, PAPER = "#222222", "#b8b8b8", "#ffffff"
TILE, PITCH = 42, 50  # of a feature map, in units of the drawing
ROW_CENTERS = 382, 138  # of the two heads' rows
INPUT, POOLED, SQUEEZED, GATES, KEPT, CONV, MAPS, OUTPUT = 34, 132, 232, 322, 510, 640, 768, 940  # left edges


def edge_maps() -> torch.Tensor:
    """Eight oriented edges of a photograph: [1, 8, 32, 32], none negative, as after a ReLU."""
    photo = load_sample_image("flower.jpg")[40:424, 150:534].mean(2) / 255
    image = F.avg_pool2d(torch.from_numpy(photo).float()[None, None], 12)
    y, x = np.mgrid[-2:3, -2:3]
    angles = np.arange(CHANNELS) * 2 * np.pi / CHANNELS
    filters = [(x * np.cos(a) + y * np.sin(a)) * np.exp(-(x**2 + y**2) / 4) for a in angles]
    weight = torch.from_numpy(np.stack(filters)).float()[:, None]
    return F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), weight).relu()


def run_layer() -> dict[str, np.ndarray]:
    """One layer, and what passes through it: maps [C, H, W], gates [heads, C], output [O, H, W]."""
    torch.manual_seed(SEED)
    layer = DynamicGroupConv2d(CHANNELS, CHANNELS, 3, padding=1, heads=HEADS, gate_factor=0.375, squeeze_rate=8)
    layer.eval()
    set_progress(layer, 1.0)
    with torch.no_grad():
        x = layer.norm(edge_maps()).relu()
        pooled = x.mean((2, 3))
        gates = head_gates(pooled, layer.gates.squeeze, layer.gates.excite, layer.gates.bias)[0]
        output = layer(edge_maps())[0]
    kept = gates > gates.sort(1).values[:, int(layer.inactive_channels) - 1 : int(layer.inactive_channels)]
    return {"maps": x[0], "pooled": pooled[0], "gates": gates, "kept": kept, "output": output}


class Drawing:
    """A figure in plain units, the origin at the bottom left."""

    def __init__(self, width: int, height: int):
        self.figure = Figure(figsize=(width / 80, height / 80), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, color: str = INK, size: float = 11, **kwargs) -> None:
        kwargs = {"ha": "center", "va": "center", **kwargs}
        self.axes.text(x, y, words, color=color, fontsize=size, linespacing=1.25, **kwargs)

    def tile(self, left: float, middle: float, image: np.ndarray, edge: str = INK, size: float = TILE) -> None:
        """A feature map, dark where it is large, around the height `middle`."""
        bottom = middle - size / 2
        ink = np.clip(image / np.quantile(image, 0.99), 0, 1)
        self.axes.imshow(
            1 - ink, extent=(left, left + size, bottom, bottom + size), cmap="gray", vmin=0, vmax=1, zorder=2
        )
        self.axes.add_patch(Rectangle((left, bottom), size, size, fill=False, edgecolor=edge, linewidth=1.8, zorder=3))

    def box(self, left: float, middle: float, width: float, height: float, color: str, words: str) -> None:
        corner = left, middle - height / 2
        style = "round,pad=0,rounding_size=8"
        self.axes.add_patch(
            FancyBboxPatch(corner, width, height, style, facecolor=color + "22", edgecolor=color, lw=1.5)
        )
        self.text(left + width / 2, middle, words, color, 10.5)

    def line(self, *points: tuple[float, float], color: str = INK, width: float = 1.2, alpha: float = 1.0) -> None:
        self.axes.plot(*zip(*points), color=color, linewidth=width, alpha=alpha, solid_capstyle="round")

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
        style = "-|>,head_width=3,head_length=5"
        self.axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, color=color, lw=1.3, shrinkA=0, shrinkB=0))


def heights(count: int, center: float, pitch: float) -> list[float]:
    """`count` heights around a center, from the top down."""
    return [center + pitch * ((count - 1) / 2 - place) for place in range(count)]


def draw_input(drawing: Drawing, layer: dict) -> list[float]:
    """The channels and their means; returns the height of each channel."""
    rows = heights(CHANNELS, 260, PITCH)
    shades = layer["pooled"] / layer["pooled"].max()
    for row, image, shade in zip(rows, layer["maps"], shades):
        drawing.tile(INPUT, row, image.numpy())
        drawing.arrow((INPUT + TILE + 5, row), (POOLED - 5, row))
        cell = Rectangle((POOLED, row - 11), 22, 22, facecolor=str(1 - 0.85 * float(shade)), edgecolor=INK, lw=1)
        drawing.axes.add_patch(cell)
    return rows


def draw_gates(drawing: Drawing, layer: dict, head: int, rows: list[float]) -> None:
    """Two small linear layers, and one bar for each gate, in color where the channel is kept."""
    color, center = HEAD_COLORS[head], ROW_CENTERS[head]
    gates, kept = layer["gates"][head], layer["kept"][head]
    places, hidden = heights(CHANNELS, center, 24), heights(2, center, 56)
    for row in rows:
        for unit in hidden:
            drawing.line((POOLED + 24, row), (SQUEEZED - 6, unit), color=color, width=0.6, alpha=0.45)
    for unit in hidden:
        for place in places:
            drawing.line((SQUEEZED + 6, unit), (GATES - 4, place), color=color, width=0.6, alpha=0.45)
        drawing.axes.plot(SQUEEZED, unit, "o", markersize=10, color=PAPER, markeredgecolor=color, markeredgewidth=1.5)
    longest = float(layer["gates"].max())
    for place, gate, is_kept in zip(places, gates, kept):
        length = 96 * float(gate) / longest
        face, edge = (color, color) if is_kept else (PAPER, FAINT)
        drawing.axes.add_patch(
            Rectangle((GATES, place - 8), max(length, 1.5), 16, facecolor=face, edgecolor=edge, lw=1)
        )
        words, ink = (f"{gate:.2f}", color) if is_kept else ("dropped", FAINT)
        drawing.text(GATES + length + 7, place, words, ink, 8.5, ha="left")
    drawing.text(GATES + 30, center + 114, f"gates of head {head}", color, 11, weight="bold")


def draw_convolution(drawing: Drawing, layer: dict, head: int) -> list[float]:
    """The channels that are kept, the head's own filters, its outputs; returns the outputs' heights."""
    color, center = HEAD_COLORS[head], ROW_CENTERS[head]
    chosen = layer["kept"][head].nonzero().flatten().tolist()
    rows = heights(len(chosen), center, 60)
    for row, channel in zip(rows, chosen):
        drawing.tile(KEPT, row, layer["maps"][channel].numpy(), color, 48)
        drawing.line((KEPT + 54, row), (CONV - 16, center), color=color, width=1.0, alpha=0.8)
        drawing.text(KEPT - 8, row, f"{channel}", color, 10, ha="right")
    drawing.arrow((GATES + 142, center), (KEPT - 24, center), color)
    drawing.arrow((CONV - 16, center), (CONV - 3, center), color)
    drawing.box(CONV, center, 84, 92, color, f"convolution,\nfilters of\nhead {head}")
    places = heights(CHANNELS // HEADS, center, PITCH)
    for place, image in zip(places, layer["output"][head::HEADS]):
        drawing.line((CONV + 87, center), (MAPS - 4, place), color=color, width=1.0, alpha=0.8)
        drawing.tile(MAPS, place, image.relu().numpy(), color)
    return places


def draw_output(drawing: Drawing, layer: dict, places: list[list[float]]) -> None:
    """The outputs of all heads, interleaved: channel j * heads + h is filter j of head h."""
    for channel, row in enumerate(heights(CHANNELS, 260, PITCH)):
        filter_, head = divmod(channel, HEADS)
        color = HEAD_COLORS[head]
        drawing.line((MAPS + TILE + 4, places[head][filter_]), (OUTPUT - 4, row), color=color, width=1.4)
        drawing.tile(OUTPUT, row, layer["output"][channel].relu().numpy(), color)


def draw(layer: dict) -> Figure:
    drawing = Drawing(1020, 580)
    rows = draw_input(drawing, layer)
    places = []
    for head in range(HEADS):
        draw_gates(drawing, layer, head, rows)
        places.append(draw_convolution(drawing, layer, head))
    draw_output(drawing, layer, places)
    # The channels themselves go around the gates, above the first row and below the second.
    for edge, first, last in ((514, rows[0] + 26, ROW_CENTERS[0] + 92), (6, rows[-1] - 26, ROW_CENTERS[1] - 92)):
        drawing.line((INPUT + TILE / 2, first), (INPUT + TILE / 2, edge), (KEPT + 24, edge))
        drawing.arrow((KEPT + 24, edge), (KEPT + 24, last))
    captions = [
        (INPUT + 21, "input\nchannels"),
        (POOLED + 11, "mean\nof each"),
        (SQUEEZED, "two small\nlayers a head"),
        (GATES + 60, "one gate a channel,\nthe largest are kept"),
        (KEPT + 24, "kept channels,\ntimes their gates"),
        (CONV + 42, "only these\nare convolved"),
        (MAPS + 21, "outputs\nof each head"),
        (OUTPUT + 21, "interleaved\noutput"),
    ]
    for x, words in captions:
        for height, line in zip((556, 540), words.split("\n")):
            drawing.text(x, height, line, INK, 10.5, va="baseline")
    return drawing.figure


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("layer.svg")
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "dgc"})
    draw(run_layer()).savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=120)


if __name__ == "__main__":
    main()
