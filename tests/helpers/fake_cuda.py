"""What the fake GPU puts in the place of functions of `torch.cuda`."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["cuda_functions", "nothing"]


def nothing(*args, **kwargs):
    return None


class _Stream:
    """A stream, which nothing waits for but `synchronize`."""

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self):
        torch.cuda.synchronize()

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def query(self):
        return True


class _Event(_Stream):
    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def elapsed_time(self, other):
        return 1.0


def cuda_functions(gpu: Any, capability: tuple[int, int]) -> dict[str, Callable]:
    """By name, those of one GPU of a compute capability, whose synchronizations `gpu` counts."""
    properties = SimpleNamespace(
        name="a GPU of shapes only",
        major=capability[0],
        minor=capability[1],
        total_memory=80 * 2**30,
        multi_processor_count=132,
    )

    def sync(*args, **kwargs):
        gpu.counts.add_sync()

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "synchronize": sync,
        "empty_cache": nothing,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": nothing,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": nothing,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": nullcontext,
        "_exchange_device": lambda device: device,
        "_maybe_exchange_device": lambda device: device,
    }
