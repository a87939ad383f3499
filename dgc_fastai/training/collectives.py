"""The process group of a run, and the collective operations on it.

torchrun or accelerate start the processes (see `launch`). In a single process no group exists, and every function here
returns its input, or does nothing.
"""

import logging
import secrets
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..utils import launch
from ..utils.errors import LostProcess, dead_reader
from .watch import Watch, watch_processes

__all__ = [
    "all_gather_bytes",
    "all_reduce_max",
    "all_reduce_mean",
    "broadcast_bytes",
    "destroy_process_group",
    "has_process_group",
    "init_process_group",
    "is_first_to_report",
    "lost_processes_named",
]

TIMEOUT = timedelta(minutes=10)  # the main process saves, and every process compiles, while the others wait

WATCHED_DEVICES = ("cuda",)  # what waits for them does not hear that another process has died; gloo says so itself

_store: dist.Store | None = None
_watch: Watch | None = None
_advice = ""  # what to do if a process dies now


def init_process_group(device: torch.device) -> None:
    """Join the other processes, if there are any: by NCCL for CUDA tensors, and by gloo for those on the CPU.

    Raises:
        LostProcess: the main process has not joined within `TIMEOUT`.
    """
    global _store, _watch
    if launch.world_size() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    _store = _fresh_store(store, rank, count)
    dist.init_process_group(backend, timeout=TIMEOUT, store=_store, rank=rank, world_size=count)
    if device.type in WATCHED_DEVICES:
        own = _store.clone()  # the program may be waiting in the other
        _watch = watch_processes(_store, rank, count, TIMEOUT.total_seconds(), partial(_report_loss, own))
    if not launch.is_main_process():
        mute_repeated_warnings()


def _report_loss(store: dist.Store) -> None:
    if _is_first(store):
        print(f"error: {_lost()}", file=sys.stderr)


def _lost() -> LostProcess:
    return LostProcess(f"another process of this run has died, or its machine has{_advice}")


def mute_repeated_warnings() -> None:
    """Silence what every process would print alike, such as the warning that the C++ kernel is built.

    Warnings about images stay: each process reads its own.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("dgc_fastai.ops").setLevel(logging.ERROR)


def _fresh_store(store: dist.Store, rank: int, count: int) -> dist.Store:
    """A part of a launcher's store that only the processes of this start use.

    The store outlives processes that are restarted, and keeps the addresses of those that have died; and the launchers
    of several machines may count restarts differently. So the main process names a new part of the store, and confirms
    to each of the others that it has seen it there. What earlier processes have written confirms nothing.
    """
    if rank == 0:
        name = secrets.token_hex(8)
        store.set("part", name)
        others = [store.get(f"{name}/{other}").decode() for other in range(1, count)]
        store.set(f"{name}/seen", " ".join(others))
        return dist.PrefixStore(name, store)
    own, until = secrets.token_hex(8), time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < until:
        name = store.get("part").decode()
        store.set(f"{name}/{rank}", own)
        if store.check([f"{name}/seen"]) and own in store.get(f"{name}/seen").decode().split():
            return dist.PrefixStore(name, store)
        time.sleep(0.05)
    raise LostProcess("the main process of this run has not joined")


def destroy_process_group() -> None:
    """Leave the other processes, when all are done."""
    global _store, _watch
    if _watch is not None:
        _watch.leave()
        _watch = None
    if _store is not None:
        dist.destroy_process_group()
        _store = None


def has_process_group() -> bool:
    """Whether this process has joined others."""
    return _store is not None


def is_first_to_report() -> bool:
    """Whether this process is to print the error that has stopped all: the first that asks is."""
    if _store is None:
        return launch.local_rank() == 0
    return _is_first(_store)


def _is_first(store: dist.Store) -> bool:
    with suppress(RuntimeError):  # the process that kept the store has ended
        return store.add("stopped", 1) == 1
    return True


@contextmanager
def lost_processes_named(advice: str = "") -> Iterator[None]:
    """Raise LostProcess for PyTorch's several errors that mean that another process has died.

    Args:
        advice: what is left of the run, and what to do, for the end of the message.
    """
    global _advice
    _advice = advice and f"; {advice}"
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if death := dead_reader(error):
            raise LostProcess(f"{death}; try fewer data.workers{_advice}") from None
        if _store is not None and (isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text):
            raise _lost() from None
        raise
    finally:
        _advice = ""


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if _store is None:
        return number
    one = torch.tensor(number)
    dist.all_reduce(one, dist.ReduceOp.MAX)
    return int(one)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of the processes' tensors."""
    if _store is None:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / launch.world_size()


def all_gather_bytes(content: bytes) -> list[bytes]:
    """The content of every process, by rank."""
    if _store is None:
        return [content]
    lengths = [torch.tensor(0) for _ in range(launch.world_size())]
    dist.all_gather(lengths, torch.tensor(len(content)))
    padded = torch.frombuffer(bytearray(content.ljust(max(map(int, lengths)), b"\0")), dtype=torch.uint8)
    every = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(every, padded)
    return [one.numpy().tobytes()[:length] for one, length in zip(every, lengths)]


def broadcast_bytes(content: bytes | None) -> bytes | None:
    """The content of the main process; that of the others is ignored."""
    if _store is None:
        return content
    size = torch.tensor(-1 if content is None else len(content))
    dist.broadcast(size, 0)
    if size < 0:
        return None
    if launch.is_main_process() and content is not None:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    else:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return data.numpy().tobytes()
