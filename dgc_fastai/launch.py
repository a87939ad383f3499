"""What torchrun and accelerate tell each of the processes they start, by way of its environment. Imports no torch."""

import os

__all__ = ["is_first", "local_rank", "processes", "rank", "restarts"]


def processes() -> int:
    """How many processes train together, on all machines; 1 where nobody has started several."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """The number of this process among those of its machine, and so of its GPU."""
    return _number("LOCAL_RANK", 0)


def restarts() -> int:
    """How often torchrun has started all processes again, after one of them had died."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def is_first() -> bool:
    """Whether this is the process that prints, logs and writes for all."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
