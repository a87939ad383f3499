"""Matplotlib figures as files. Imports no matplotlib."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["to_png"]


def to_png(figure: "Figure") -> bytes:
    """Render a figure as the content of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
