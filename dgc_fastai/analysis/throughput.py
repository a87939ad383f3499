"""Images per second of a recipe's data pipeline, as a whole and of its parts."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, NamedTuple

import torch

from ..data.epoch_loader import EpochDL
from ..data.image_files import UnreadableImage, open_image
from ..data.loaders import build_dataloaders
from ..recipe.schema import Recipe

__all__ = ["Source", "find_bottleneck", "loader_name", "measure_rates", "pipeline_sources", "repeat"]

MIN_SECONDS = 2.0  # of a timed block
SAMPLE_SIZE = 64  # images of a block that one thread reads


class Source(NamedTuple):
    """Something that processes images."""

    name: str
    run: Callable[[], tuple[int, float]]
    """Runs for at least `MIN_SECONDS`, if there are enough images; returns the number of images and the seconds."""


def pipeline_sources(recipe: Recipe, device: torch.device, wait: Callable[[], None]) -> list[Source]:
    """A recipe's training images: decoded, and augmented, by one thread; from its loader, by number of workers.

    Every source reads the same images repeatedly, so that files come from the system's cache, not from the disk.

    Args:
        wait: returns when the device has finished its work.

    Raises:
        RecipeError: the data are not there.
    """
    train = build_dataloaders(recipe.data, device).train
    if not recipe.data.is_image_files:
        return [Source(loader_name(0), lambda: read_loader(train, wait))]

    def loader(workers: int) -> Source:
        return Source(loader_name(workers), lambda: read_loader(train.new(num_workers=workers), wait))

    train.before_iter()  # tells the transforms that these are training images
    sample = range(0, len(train.items), max(1, len(train.items) // SAMPLE_SIZE))
    files = [train.items[index] for index in sample]
    return [
        Source("decode, one thread", lambda: repeat(lambda: _count_readable(open_image, files))),
        Source("decode and augment, one thread", lambda: repeat(lambda: _count_readable(train.do_item, sample))),
        *map(loader, worker_counts(recipe.data.workers)),
    ]


def loader_name(workers: int) -> str:
    """The name of a loader among the sources."""
    return f"loader, {workers} worker{'s' * (workers != 1)}"


def worker_counts(own: int) -> list[int]:
    """The recipe's own number of workers, zero, and the powers of two up to the number of available cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({0, own, *(2**power for power in range(cores.bit_length()))})


def repeat(call: Callable[[], int]) -> tuple[int, float]:
    """Call a function that returns a number of images for `MIN_SECONDS`: the sum of its results, and the seconds."""
    images, began = 0, time.perf_counter()
    while True:
        images += call()
        seconds = time.perf_counter() - began
        if seconds >= MIN_SECONDS:
            return images, seconds


def read_loader(loader: EpochDL, wait: Callable[[], None]) -> tuple[int, float]:
    """Read an epoch, but not for much longer than `MIN_SECONDS`: the number of images and the seconds.

    If the epoch is long enough, the timer starts after one batch per worker: starting the workers takes a moment.
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
            if seconds >= MIN_SECONDS and number >= warm_up + 2 * workers:
                break
    return images, seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _count_readable(function: Callable[[Any], Any], arguments: Sequence[Any]) -> int:
    """Call a function with each argument, an image: how many of them are readable."""
    readable = 0
    with _one_thread():
        for argument in arguments:
            with suppress(UnreadableImage):  # the loader reports it
                function(argument)
                readable += 1
    return readable


def measure_rates(sources: Sequence[Source], rounds: int, notify: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per source: images per second in every round, their median and range, after a warm-up round.

    Args:
        notify: called with the name of the next source, while no timer runs.
    """
    rates: dict[str, list[float]] = {source.name: [] for source in sources}
    for number in range(rounds + 1):
        for source in sources if number % 2 == 0 else reversed(sources):
            notify(source.name)
            images, seconds = source.run()
            if number:
                rates[source.name].append(images / seconds)
    return [
        {"name": name, "median": statistics.median(found), "min": min(found), "max": max(found), "rates": found}
        for name, found in rates.items()
    ]


def find_bottleneck(rows: Sequence[dict[str, Any]], network: str, workers: int) -> dict[str, Any]:
    """Whether training is limited by the network, named as one of the rows, or by the loader with so many workers.

    Returns:
        "limit", "network" or "data"; "taken" and "given", images per second of the network and of the loader; and
        "enough", the smallest larger number of workers, of those measured, that is faster than the network, or None.
    """
    rates = {row["name"]: row["median"] for row in rows}
    taken, given = rates[network], rates[loader_name(workers)]
    more = (count for count in worker_counts(workers) if count > workers)
    enough = next((count for count in more if rates.get(loader_name(count), 0) > taken), None)
    return {"limit": "data" if given < taken else "network", "taken": taken, "given": given, "enough": enough}
