"""Words and rounded numbers that a benchmark's tables and figure share."""

import math
from collections.abc import Sequence
from typing import Any

__all__ = [
    "bottleneck_sentence",
    "decimal_places",
    "machine_line",
    "measurement_title",
    "noise_and_digits",
    "plural",
    "ratio_range",
    "rounded",
]


def machine_line(report: dict[str, Any]) -> str:
    """The machine and the recipe's settings that times depend on, in one line."""
    machine = report["machine"]
    threads = f", {plural(machine['threads'], 'thread')}" if machine["device"] == "cpu" else ""
    train = report["recipe"]["train"]
    layout = "channels last" if train["channels_last"] else "channels first"
    mode = "compiled" if train["compile"] else "eager"
    return f"{machine['processor']}{threads}, torch {machine['torch']}, {train['precision']}, {layout}, {mode}"


def measurement_title(measurement: dict[str, Any]) -> str:
    """Such as "training step, 64 images"."""
    return f"{measurement['what']}, {plural(measurement['batch'], 'image')}"


def bottleneck_sentence(data: dict[str, Any]) -> str:
    """Whether the data loader limits training, from a report's "data"."""
    limits = data["limit"] == "data"
    remedy = f"; {data['enough']} would be enough" if limits and data["enough"] else ""
    return (
        f"The network can train on {data['taken']:,.3g} images/s, the loader gives {data['given']:,.3g} with "
        f"{plural(data['workers'], 'worker')}: the data {'limits' if limits else 'does not limit'} training{remedy}."
    )


def plural(count: int, noun: str) -> str:
    """A number and its noun: 1 image, 2 images."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def noise_and_digits(rows: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Noise, and decimals of ratios: noise is the largest deviation from 1 of the last row, the baseline repeated."""
    noise = max(abs(rows[-1]["ratio"][end] - 1) for end in ("min", "max"))
    return noise, 2 if noise < 0.1 else 1


def ratio_range(row: dict[str, Any], digits: int) -> str:
    """The smallest and the largest ratio of a row, rounded."""
    return f"{row['ratio']['min']:.{digits}f} to {row['ratio']['max']:.{digits}f}"


def decimal_places(value: float, noise: float) -> int:
    """How many decimals of a value are significant: at most three digits, fewer if the relative noise is larger.

    Negative if the ones are not significant.
    """
    if value <= 0:
        return 0
    first = -math.floor(math.log10(value))
    return min(first + 2, max(first, -math.floor(math.log10(value * noise)))) if noise else first + 2


def rounded(value: float, decimals: int) -> str:
    """A value rounded to so many decimals, as `decimal_places` counts them."""
    return f"{round(value, decimals):,.{max(0, decimals)}f}"
