"""Means over seeds and how far they can be trusted."""

import statistics
from collections.abc import Sequence

__all__ = ["mean_text", "standard_error"]


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of the values; None if there are fewer than two."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def mean_text(values: Sequence[float], digits: int) -> str:
    """Such as "81.72 ± 0.06"; the mean alone for one value, and nothing for none."""
    if not values:
        return ""
    error = standard_error(values)
    return f"{statistics.mean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
