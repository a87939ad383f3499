"""Pictures of what the gates of a network do."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from ..utils.figures import to_png
from .gate_samples import GateSamples, most_dissimilar, plane_of

__all__ = ["draw_classes", "draw_images", "draw_layers", "draw_map"]

MOST_LAYERS = 4  # in the picture of classes
MOST_NAMES = 40  # of classes beside an axis
NO_CHANNEL = "0.9"


def draw_layers(gates: dict[str, Any], title: str) -> bytes:
    """A PNG of all channels, layer by layer, a thin row for each head; and how much each layer selects by image."""
    layers = gates["layers"]
    rows, widest = [layer["heads"] for layer in layers], max(layer["channels"] for layer in layers)
    usage = np.full((sum(rows), widest), np.nan)
    starts = np.cumsum([0, *rows])
    for layer, start in zip(layers, starts):
        usage[start : start + layer["heads"], : layer["channels"]] = layer["usage"]
    height = max(2.5, min(0.32 * len(layers), 12)) + 1.4
    figure = Figure(figsize=(11, height), layout="constrained")
    figure.suptitle(title)
    wide, bars = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    wide.set_facecolor(NO_CHANNEL)
    picture = wide.imshow(usage, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    for start in starts[1:-1]:
        wide.axhline(start - 0.5, color="white", linewidth=0.8)
    middle = (starts[:-1] + starts[1:] - 1) / 2
    wide.set_yticks(
        middle, [f"{number:3}  {layer['name']}" for number, layer in enumerate(layers, 1)], fontsize="small"
    )
    wide.set_xlabel("input channel")
    wide.set_ylabel("layer, and in it a row for each head")
    label = "share of the images that keep the channel"
    figure.colorbar(picture, ax=wide, location="bottom", shrink=0.5, pad=0.01, aspect=40, label=label)
    values = [("usage_entropy", "usage entropy", "tab:blue"), ("class_share", "explained by class", "tab:orange")]
    shown = [one for one in values if any(layer[one[0]] is not None for layer in layers)]
    for place, (key, label, color) in enumerate(shown):
        size = np.array(rows) * 0.8 / len(shown)
        offset = (place - (len(shown) - 1) / 2) * size
        bars.barh(middle + offset, [layer[key] or 0 for layer in layers], size, color=color, label=label)
    bars.set_xlim(0, 1)
    bars.grid(axis="x", alpha=0.3)
    bars.set_axisbelow(True)
    bars.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08))
    bars.tick_params(labelleft=False)
    return to_png(figure)


def draw_classes(gates: dict[str, Any], title: str) -> bytes | None:
    """A PNG of how classes differ in the channels they keep, for the layers in which they differ most.

    None without classes, or where there are too many of them for `usage_by_class`.
    """
    able = [(number, one) for number, one in enumerate(gates["layers"], 1) if one["usage_by_class"]]
    chosen = sorted(sorted(able, key=lambda one: -one[1]["class_information"])[:MOST_LAYERS], key=lambda one: one[0])
    if not chosen:
        return None
    names = gates["classes"]
    tables = []
    for _, layer in chosen:
        shares = 100 * np.array(layer["usage_by_class"])
        tables.append((shares - 100 * np.array(layer["usage"])).reshape(len(names), -1))
    most = max(1.0, *(float(np.abs(table).max()) for table in tables))
    height = max(1.1, min(0.17 * len(names), 4))
    figure = Figure(figsize=(11, (height + 0.6) * len(chosen) + 1.2), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for axes, (number, layer), table in zip(grid, chosen, tables):
        picture = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-most, vmax=most)
        for head in range(1, layer["heads"]):
            axes.axvline(head * layer["channels"] - 0.5, color="0.4", linewidth=0.8)
        axes.set_title(f"layer {number}: {layer['name']}", fontsize="medium")
        centers = (np.arange(layer["heads"]) + 0.5) * layer["channels"]
        axes.set_xticks(centers, [f"head {head + 1}, {layer['channels']} channels" for head in range(layer["heads"])])
        axes.tick_params(axis="x", length=0)
        if len(names) <= MOST_NAMES:
            axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize="small")
        else:
            axes.set_ylabel("class")
    label = "images of the class that keep the channel, minus images of all classes that do (percentage points)"
    figure.colorbar(picture, ax=list(grid), location="bottom", shrink=0.5, pad=0.01, aspect=50, label=label)
    return to_png(figure)


def draw_images(samples: GateSamples, names: list[str] | None, title: str, count: int = 6) -> bytes | None:
    """A PNG of the images whose selections differ most, beside what they select; None if all select the same."""
    chosen = most_dissimilar(samples.kept, count)
    if len(chosen) < 2:
        return None
    usual = samples.kept.mean(0) >= 0.5
    lines = -(-len(chosen) // 2)
    figure = Figure(figsize=(11, 2.1 * lines + 0.9), layout="constrained")
    meaning = "gray: kept, as by most images;  red: kept, other than by most;  blue: dropped, other than by most"
    figure.suptitle(f"{title}\n{meaning}")
    grid = figure.subplots(lines, 4, squeeze=False, width_ratios=[1, 3, 1, 3]).reshape(-1, 2)
    for axes in grid[len(chosen) :].flat:
        axes.set_axis_off()
    for (left, right), number in zip(grid, chosen):
        left.imshow(samples.pictures[number], interpolation="nearest")
        left.set_xticks([])
        left.set_yticks([])
        if names is not None and samples.labels is not None:
            left.set_title(_short(names[samples.labels[number]]), fontsize="medium")
        right.imshow(_selection(samples.kept[number], usual, samples.shapes), aspect="auto", interpolation="nearest")
        right.set_yticks([])
        right.set_ylabel("layers and heads", fontsize="small")
        right.tick_params(labelsize="small")
        if number in chosen[-2:]:
            right.set_xlabel("input channel", fontsize="small")
    return to_png(figure)


def _selection(kept: np.ndarray, usual: np.ndarray, shapes: list[tuple[int, int]]) -> np.ndarray:
    """What an image keeps as a picture [rows, channels, 3], with a row for each head of each layer."""
    colors = np.array([[1, 1, 1], [0.7, 0.7, 0.7], [0.13, 0.4, 0.75], [0.8, 0.1, 0.1]])
    rows = np.full((sum(heads for heads, _ in shapes), max(channels for _, channels in shapes), 3), float(NO_CHANNEL))
    kind = np.where(kept == usual, kept.astype(int), 2 + kept)
    start = row = 0
    for heads, channels in shapes:
        part = kind[start : start + heads * channels].reshape(heads, channels)
        rows[row : row + heads, :channels] = colors[part]
        start, row = start + heads * channels, row + heads
    return rows


def draw_map(samples: GateSamples, names: list[str] | None, title: str) -> bytes | None:
    """A PNG of the images in a plane, those close together that select alike; None if all select nearly the same."""
    found = plane_of(samples.kept)
    if found is None:
        return None
    places, shares = found
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    labels = np.zeros(len(places), int) if samples.labels is None else samples.labels
    colors = _class_colors(labels, len(names or ()))
    axes.scatter(places[:, 0], places[:, 1], c=colors, s=12, linewidths=0)
    for number in _apart(places, 0.045):
        picture = samples.pictures[number]
        box = OffsetImage(picture, zoom=22 / max(picture.shape[:2]), interpolation="nearest")
        frame = {"edgecolor": colors[number], "linewidth": 2.5, "boxstyle": "square,pad=0"}
        axes.add_artist(AnnotationBbox(box, places[number], pad=0, bboxprops=frame))
    axes.set_xlabel(f"first principal component of the selections ({100 * shares[0]:.0f} % of the variance)")
    axes.set_ylabel(f"second ({100 * shares[1]:.0f} %)")
    axes.margins(0.06)
    if names is not None and samples.labels is not None and len(names) <= 20:
        _legend(axes, names, samples.labels)
    return to_png(figure)


def _apart(places: np.ndarray, share: float) -> list[int]:
    """Places of which no two are closer than a share of the picture, so that their pictures do not cover each other."""
    scaled = (places - places.min(0)) / np.maximum(np.ptp(places, 0), 1e-9)
    chosen: list[int] = []
    for number, place in enumerate(scaled):
        if not chosen or np.abs(scaled[chosen] - place).max(1).min() > share:
            chosen.append(number)
    return chosen


def _class_colors(labels: np.ndarray, classes: int) -> Any:
    palette = colormaps["tab10" if classes <= 10 else "tab20" if classes <= 20 else "turbo"]
    return palette(labels if classes <= 20 else labels / max(classes - 1, 1))


def _legend(axes: Axes, names: list[str], labels: np.ndarray) -> None:
    present = sorted(set(labels.tolist()))
    colors = _class_colors(np.array(present), len(names))
    for label, color in zip(present, colors):
        axes.scatter([], [], color=color, s=30, label=_short(names[label]))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="class")


def _short(name: str, most: int = 24) -> str:
    """A class name that matplotlib draws as it is, and not longer than the picture bears."""
    name = name if len(name) <= most else name[: most - 3] + "..."
    return name.replace("$", r"\$")
