"""The picture of a run."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..utils.figures import to_png


def draw_curves(rows: Sequence[dict[str, float]], title: str) -> bytes:
    """A PNG of a run's loss, accuracy, inactive share and learning rate against the epochs done."""
    figure = Figure(figsize=(10, 6.5))
    # Set by hand: finding the margins takes as long as drawing.
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.08, top=0.89, wspace=0.16, hspace=0.22)
    figure.suptitle(title)
    epochs = [row["epoch"] for row in rows]
    panels = [
        ("loss", [("train_loss", "training (smoothed)"), ("valid_loss", "validation")], 1),
        ("accuracy (%)", [("top_1", "top-1"), ("top_5", "top-5")], 100),
        ("channels inactive (%)", [("inactive", "")], 100),
        ("learning rate", [("lr", "")], 1),
    ]
    for axes, (heading, curves, scale) in zip(figure.subplots(2, 2, sharex=True).flat, panels):
        for name, label in curves:
            values = [scale * row[name] for row in rows]
            axes.plot(epochs, values, label=label, marker="o" if len(rows) < 40 else "", markersize=3)
        axes.set_title(heading, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) > 1:
            axes.legend()
        if scale == 1:
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylim(-2, 102)
    for axes in figure.axes[2:]:
        axes.set_xlabel("epoch")
    return to_png(figure)
