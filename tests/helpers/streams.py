"""CUDA's streams on a CPU: what is queued on one runs as late as the waits between streams allow."""

from contextlib import contextmanager

import pytest
import torch

from dgc_fastai.data import prefetch


class Stream:
    """A queue of functions."""

    current = None
    """The one that work is queued on; None while the program's own stream is, whose work runs at once."""

    def __init__(self, device=None):
        self.queue, self.done = [], 0

    def wait_stream(self, other):
        assert other is MAIN

    def record_event(self):
        return self, len(self.queue)

    def wait_event(self, event):
        assert self is MAIN
        stream, place = event
        while stream.done < place:
            stream.queue[stream.done]()
            stream.done += 1


MAIN = Stream()


@contextmanager
def entered(stream):
    assert Stream.current is None
    Stream.current = stream
    try:
        yield
    finally:
        Stream.current = None


def queue(work):
    """Do some work on the current stream."""
    work() if Stream.current is None else Stream.current.queue.append(work)


@pytest.fixture
def streams(monkeypatch):
    """Lets a CPU prefetch; yields the tensors that were kept for the program's own stream."""
    kept = []
    monkeypatch.setattr(prefetch, "PREFETCHING_DEVICES", ("cpu",))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: MAIN)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor))
    return kept
