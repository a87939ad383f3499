"""A recipe's data pipeline on the clock, by itself and by its parts: images a second."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch

from ..data.loaders import FILES, EpochDL, UnreadableImage, build_dataloaders, open_image
from ..recipe.schema import Recipe

__all__ = ["Source", "loader_name", "measure_rates", "pipeline_sources", "repeat", "verdict"]

SECONDS = 2.0  # to go on for, at least, until the clock is read
SAMPLE = 64  # images that a single process reads in one go


class Source(NamedTuple):
    """Something that takes or gives images."""

    name: str
    run: Callable[[], tuple[int, float]]
    """Goes on for some seconds; returns how many images that were, and the seconds."""


def pipeline_sources(recipe: Recipe, device: torch.device, wait: Callable[[], None]) -> list[Source]:
    """A recipe's training images: decoded, and augmented, by one thread; from its loader, by numbers of workers.

    Every source reads the same images again and again, so that files come from the system's cache, not from the disk.

    Args:
        wait: returns when the device has done its work.

    Raises:
        RecipeError: the data are not there.
    """
    train = build_dataloaders(recipe.data, device).train
    if recipe.data.name not in FILES:
        return [Source(loader_name(0), lambda: read(train, wait))]

    def loader(workers: int) -> Source:
        return Source(loader_name(workers), lambda: read(train.new(num_workers=workers), wait))

    train.before_iter()  # tells the transforms that these are training images
    sample = range(0, len(train.items), max(1, len(train.items) // SAMPLE))
    return [
        Source("decode, one thread", lambda: repeat(lambda: _count(open_image, [train.items[one] for one in sample]))),
        Source("decode and augment, one thread", lambda: repeat(lambda: _count(train.do_item, sample))),
        *map(loader, worker_counts(recipe.data.workers)),
    ]


def loader_name(workers: int) -> str:
    """The name of a loader among the sources."""
    return f"loader, {workers} worker{'s' * (workers != 1)}"


def worker_counts(own: int) -> list[int]:
    """The recipe's own number of workers, none, and powers of two up to the number of cores that we may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({0, own, *(2**power for power in range(cores.bit_length()))})


def repeat(call: Callable[[], int]) -> tuple[int, float]:
    """Call what returns a number of images until the time is up: all of these, and the seconds."""
    images, began = 0, time.perf_counter()
    while True:
        images += call()
        seconds = time.perf_counter() - began
        if seconds >= SECONDS:
            return images, seconds


def read(loader: EpochDL, wait: Callable[[], None]) -> tuple[int, float]:
    """The images of an epoch, or as many as come while the time is not up, and the seconds.

    The clock starts when each worker has given a batch, if the epoch is long enough: starting them takes a moment.
    """
    loader.set_epoch(seed=0, epoch=0)
    workers = loader.fake_l.num_workers
    warm_up = workers if len(loader) > 4 * workers else 0
    images, seconds, began = 0, 0.0, time.perf_counter()
    with closing(iter(loader)) as batches:
        for number, (x, _) in enumerate(batches):
            wait()
            if number < warm_up:
                began = time.perf_counter()
                continue
            images, seconds = images + len(x), time.perf_counter() - began
            if seconds >= SECONDS and number >= warm_up + 2 * workers:
                break
    return images, seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _count(function: Callable[[Any], Any], arguments: Sequence[Any]) -> int:
    """How many of the images a function can read."""
    readable = 0
    with _one_thread():
        for argument in arguments:
            try:
                function(argument)
                readable += 1
            except UnreadableImage:  # the loader names it
                pass
    return readable


def measure_rates(sources: Sequence[Source], rounds: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each source: images a second in every round, their median and range, after a round that warms up.

    Args:
        tell: is told the name of the source that is next, while no clock runs.
    """
    rates: dict[str, list[float]] = {source.name: [] for source in sources}
    for number in range(rounds + 1):
        for source in sources if number % 2 == 0 else reversed(sources):
            tell(source.name)
            images, seconds = source.run()
            if number:
                rates[source.name].append(images / seconds)
    return [
        {"name": name, "median": statistics.median(found), "min": min(found), "max": max(found), "rates": found}
        for name, found in rates.items()
    ]


def verdict(rows: Sequence[dict[str, Any]], network: str, workers: int) -> dict[str, Any]:
    """Which limits the other, the network of one row's name or the loader with so many workers.

    `taken` and `given` are their images a second; `enough` is the least larger number of workers, of those measured,
    that gives more than is taken, or None.
    """
    rates = {row["name"]: row["median"] for row in rows}
    taken, given = rates[network], rates[loader_name(workers)]
    more = (count for count in worker_counts(workers) if count > workers)
    enough = next((count for count in more if rates.get(loader_name(count), 0) > taken), None)
    return {"limit": "data" if given < taken else "network", "taken": taken, "given": given, "enough": enough}
