"""Times and peak memory of function calls: what is measured, on which machine, and its summary."""

import gc
import itertools
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import fastai
import timm
import torch
from torch.profiler import ProfilerActivity, profile

from ..utils.provenance import processor_name
from ..utils.timing import Variant, measure_times

__all__ = [
    "Measurement",
    "Variant",
    "describe_machine",
    "measure_times",
    "peak_memory",
    "spread",
    "summarize",
]


class Measurement(NamedTuple):
    """Variants to compare with the first of them."""

    what: str
    batch: int
    variants: list[Variant]
    with_memory: bool


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes allocated at any time during a call, beyond those allocated before; None if not counted here.

    Counted by PyTorch's allocator, so without memory that libraries such as oneDNN allocate for themselves.
    """
    gc.collect()  # not in the middle of the call
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        return max(itertools.accumulate(_cpu_allocations(call), initial=0))
    return None


def _cpu_allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) on the CPU during a call, in order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler prints messages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
    # No public interface gives single allocations.
    events = trace.profiler.kineto_results.events()
    of_memory = [event for event in events if event.name() == "[memory]" and "CPU" in str(event.device_type())]
    return [event.nbytes() for event in sorted(of_memory, key=lambda event: event.start_ns())]


def summarize(times: dict[str, list[float]], memory: dict[str, int | None]) -> list[dict[str, Any]]:
    """One row per variant: the median time, and median and range of its ratio to the first variant in the same round.

    Args:
        times: seconds per variant and round, from `measure_times`.
        memory: peak bytes per variant; may lack variants.
    """
    baseline = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds, baseline)]
        rows.append(
            {
                "name": name,
                "median_ms": 1000 * statistics.median(seconds),
                "ratio": spread(ratios),
                "peak_bytes": memory.get(name),
                "ms": [1000 * one for one in seconds],
            }
        )
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions that times depend on."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "timm": timm.__version__,
        "fastai": fastai.__version__,
    }
