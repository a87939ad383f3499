"""Times of function calls, measured in interleaved rounds. Imports no torch."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

__all__ = ["Variant", "measure_times"]

MIN_SECONDS = 0.1  # of a timed block; a faster variant is called several times in it
MAX_CALLS = 200


class Variant(NamedTuple):
    """A network in one of its states, and the function to time."""

    name: str
    setting: Callable[[], AbstractContextManager]
    """Brings the network into its state; entered before the timer starts."""
    call: Callable[[], Any]


def measure_times(
    variants: Sequence[Variant],
    rounds: int,
    wait: Callable[[], None] = lambda: None,
    notify: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
    block: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of a call of each variant, one number per round, after a warm-up round.

    Every round calls all variants, alternately from the first to the last and from the last to the first, so that a
    machine that becomes slower or faster does so for all of them.

    Args:
        rounds: number of rounds after the warm-up, at least one.
        wait: returns when the device has finished its work.
        notify: called with the name of the next variant, while no timer runs.
        block: seconds of a timed block, by default `MIN_SECONDS`.
    """
    block = MIN_SECONDS if block is None else block

    def seconds(variant: Variant, calls: int) -> float:
        wait()
        began = clock()
        for _ in range(calls):
            variant.call()
            wait()
        return (clock() - began) / calls

    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants if number % 2 == 0 else reversed(variants):
            notify(variant.name)
            with variant.setting():
                if number == 0:
                    variant.call()  # the first call also allocates memory, and may try several kernels
                    once = max(seconds(variant, 1), block / MAX_CALLS)
                    calls[variant.name] = math.ceil(block / once)
                else:
                    times[variant.name].append(seconds(variant, calls[variant.name]))
    return times
