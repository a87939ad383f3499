"""Batches that are copied to a GPU, and prepared there, while the step before is computed."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["prefetch"]

PREFETCHING_DEVICES = ("cuda",)  # elsewhere, nothing runs beside the step


def prefetch(batches: Iterator[Any], prepare: Callable[[Any], Any], device: torch.device) -> Iterator[Any]:
    """The prepared batches in their order; on CUDA, each is prepared on a stream of its own, one batch in advance.

    The next batch is queued before the step of this one is: fastai waits for the loss of every step, and the GPU then
    has both to do. An error of the next batch is raised after this one was used, as if it had not been taken early.

    Args:
        prepare: moves a batch to the device and works on it there. It must not draw random numbers of the device, whose
            order would change, nor wait for it.
    """
    if device.type not in PREFETCHING_DEVICES:
        return map(prepare, batches)
    return _on_a_stream(batches, prepare, device)


def _on_a_stream(batches: Iterator[Any], prepare: Callable[[Any], Any], device: torch.device) -> Iterator[Any]:
    # The only name of the iterator, to be removed: a traceback that refers to it would keep its worker processes alive.
    source = [batches]
    del batches
    stream = _stream(torch.cuda.Stream, device)
    stream.wait_stream(torch.cuda.current_stream(device))  # for what `prepare` uses beside the batch

    def take() -> tuple[Any, torch.cuda.Event | None, Exception | None]:
        try:
            batch = next(source[0])
            with torch.cuda.stream(stream):
                return prepare(batch), stream.record_event(), None
        except Exception as error:
            return None, None, error

    (batch, ready, error), following = take(), None
    try:
        while ready:
            following = take()
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            _keep(batch, current)
            yield batch
            batch, ready, error = following
        if error and not isinstance(error, StopIteration):
            raise error
    finally:
        source.clear()
        del error, following


@functools.cache
def _stream(kind: type[torch.cuda.Stream], device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: PyTorch keeps the memory of each stream for that stream."""
    return kind(device)


def _keep(batch: Any, stream: torch.cuda.Stream) -> None:
    """Keep the memory of a batch from being used again before a stream has read it."""
    if isinstance(batch, Tensor):
        batch.record_stream(stream)
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            _keep(part, stream)
