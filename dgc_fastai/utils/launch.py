"""What torchrun and accelerate tell each of the processes they start, by way of its environment. Imports no torch."""

import os

__all__ = ["is_first", "launch_name", "local_rank", "processes", "rank", "restarts", "will_restart"]


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


def will_restart() -> bool:
    """Whether torchrun starts all processes again if one dies now."""
    return restarts() < _number("TORCHELASTIC_MAX_RESTARTS", 0)


def launch_name() -> str:
    """What tells this launch from others, the same after restarts; empty where nothing does."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def is_first() -> bool:
    """Whether this is the process that prints, logs and writes for all."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
