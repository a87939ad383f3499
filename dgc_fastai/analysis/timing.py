"""Times and peak memory of calls, measured in interleaved rounds."""

import gc
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Optional

import fastai
import timm
import torch
from torch.profiler import ProfilerActivity, profile

LEAST_SECONDS = 0.1  # between two looks at the clock; what is faster is called several times

MOST_CALLS = 200


class Variant(NamedTuple):
    """A network in one of its states, and what it is to do."""

    name: str
    setting: Callable[[], AbstractContextManager]
    """Brings the network into its state; entered before the clock starts."""
    call: Callable[[], Any]


class Measurement(NamedTuple):
    """Variants to compare with the first of them."""

    what: str
    batch: int
    variants: list[Variant]
    with_memory: bool


def measure_times(
    variants: Sequence[Variant],
    rounds: int,
    wait: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of a call of each variant, one number a round, after a round that warms up.

    Every round calls every variant, in turn from the first to the last and from the last to the first: a machine
    that grows slower or faster does so for all alike.

    Args:
        rounds: how many are counted, at least one.
        wait: returns when the device has done its work.
        tell: is told the name of the variant that is next, while no clock runs.
    """

    def seconds(variant: Variant, calls: int) -> float:
        wait()
        began = clock()
        for _ in range(calls):
            variant.call()
            wait()
        return (clock() - began) / calls

    calls, times = {}, {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants if number % 2 == 0 else reversed(variants):
            tell(variant.name)
            with variant.setting():
                if number == 0:
                    variant.call()  # the first of all also allocates, and may try several kernels
                    once = max(seconds(variant, 1), LEAST_SECONDS / MOST_CALLS)
                    calls[variant.name] = math.ceil(LEAST_SECONDS / once)
                else:
                    times[variant.name].append(seconds(variant, calls[variant.name]))
    return times


def peak_memory(call: Callable[[], Any], device: torch.device) -> Optional[int]:
    """The most bytes that a call holds at any time, beyond what was held before; None where nobody counts them.

    Of PyTorch's allocator, so without what libraries such as oneDNN allocate for themselves.
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
    """The bytes of every allocation (positive) and release (negative) on the CPU during a call, in their order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler is talkative otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
    # No public interface tells them one by one.
    events = trace.profiler.kineto_results.events()
    of_memory = [event for event in events if event.name() == "[memory]" and "CPU" in str(event.device_type())]
    return [event.nbytes() for event in sorted(of_memory, key=lambda event: event.start_ns())]


def summarize(times: dict[str, list[float]], memory: dict[str, Optional[int]]) -> list[dict[str, Any]]:
    """A row for each variant: the median, and the median and the range of its ratio to the first in the same round."""
    baseline = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds, baseline)]
        rows.append(
            {
                "name": name,
                "median_ms": 1000 * statistics.median(seconds),
                "ratio": _spread(ratios),
                "peak_bytes": memory.get(name),
                "ms": [1000 * one for one in seconds],
            }
        )
    return rows


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def machine(device: torch.device) -> dict[str, Any]:
    """What times depend on, beside the recipe."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "timm": timm.__version__,
        "fastai": fastai.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system, or a processor without a name
        return platform.processor() or platform.machine()
