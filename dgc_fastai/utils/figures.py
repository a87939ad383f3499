"""Figures as files."""

import io

from matplotlib.figure import Figure


def to_png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
