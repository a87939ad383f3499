"""How this process was started: what torchrun and accelerate pass in the environment. Imports no torch.

The names follow `torch.distributed` and `torch.distributed.elastic`.
"""

import os

__all__ = ["cores", "is_main_process", "launch_id", "local_rank", "rank", "restart_count", "will_restart", "world_size"]


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world_size() -> int:
    """Number of processes that train together, on all machines; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Rank of this process among all, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Rank of this process on its machine, from 0; also the index of its GPU."""
    return _number("LOCAL_RANK", 0)


def is_main_process() -> bool:
    """Whether this is rank 0, which prints, logs and writes files for all."""
    return rank() == 0


def restart_count() -> int:
    """How often torchrun has restarted the processes after a failure."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def will_restart() -> bool:
    """Whether torchrun restarts the processes if one fails now."""
    return restart_count() < _number("TORCHELASTIC_MAX_RESTARTS", 0)


def launch_id() -> str:
    """torchrun's `--rdzv-id`, the same after restarts; empty if there is none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
