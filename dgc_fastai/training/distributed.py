"""Several processes that train one network together, as torchrun or accelerate have started them (see `launch`).

Every process takes its part of each batch, fastai's `distrib_ctx` averages the gradients by PyTorch's
DistributedDataParallel, and a step is the one that a single process would make of the whole batch. Only norms differ:
each process normalises by its own part, as is usual. In a single process, everything here does nothing.
"""

import json
import logging
import random
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Optional

import fastai.distributed  # noqa: F401  (gives a Learner its distrib_ctx)
import torch
import torch.distributed as dist
from accelerate import DistributedDataParallelKwargs
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import get_model, set_seed
from torch import Tensor

from ..utils import launch
from ..utils.errors import LostProcess

__all__ = [
    "from_first",
    "gather",
    "join",
    "largest",
    "leave",
    "lost_processes_named",
    "speaks",
    "together",
]

PATIENCE = timedelta(minutes=10)  # the slowest anybody may be: the first process saves, all of them compile

_store: Optional[dist.Store] = None


def join(device: torch.device) -> None:
    """Find the other processes, if there are any: by NCCL on CUDA, and by gloo for what lies on the CPU."""
    global _store
    if launch.world_size() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    _store = _fresh(store, rank, count)
    dist.init_process_group(backend, timeout=PATIENCE, store=_store, rank=rank, world_size=count)
    if not launch.is_main_process():  # one of them is enough to say what concerns all
        warnings.simplefilter("ignore")
        logging.getLogger("dgc_fastai.ops").setLevel(logging.ERROR)


def _fresh(store: dist.Store, rank: int, count: int) -> dist.Store:
    """The part of a store that only these processes know of.

    A launcher's store outlives the processes that it starts again, with the addresses of those that have died; and how
    often it has started them, the launchers of several machines may count differently. So the first process names a
    part of the store, and tells each of the others that it has seen it there: what an earlier one has told does not
    hold for them.
    """
    if rank == 0:
        name = secrets.token_hex(8)
        store.set("part", name)
        others = [store.get(f"{name}/{other}").decode() for other in range(1, count)]
        store.set(f"{name}/seen", " ".join(others))
        return dist.PrefixStore(name, store)
    own, until = secrets.token_hex(8), time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < until:
        name = store.get("part").decode()
        store.set(f"{name}/{rank}", own)
        if store.check([f"{name}/seen"]) and own in store.get(f"{name}/seen").decode().split():
            return dist.PrefixStore(name, store)
        time.sleep(0.05)
    raise LostProcess("the first process of this run has not come")


def leave() -> None:
    """Part from the other processes, at the good end of all."""
    global _store
    if _store is not None:
        dist.destroy_process_group()
        _store = None


def speaks() -> bool:
    """Whether it is for this process to tell what has stopped it: the first that asks does, of those that can ask."""
    if _store is None:
        return launch.local_rank() == 0
    with suppress(RuntimeError):  # whoever kept the store has gone
        return _store.add("stopped", 1) == 1
    return True


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Raise LostProcess where PyTorch tells that a process has gone; it has errors of several kinds for that."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text:
            raise LostProcess(
                "a process that reads images has died, as for lack of memory; try fewer data.workers"
            ) from None
        if _store is not None and (isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text):
            raise LostProcess("another process of this run has died, or its machine has") from None
        raise


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if _store is None:
        return number
    one = torch.tensor(number)
    dist.all_reduce(one, dist.ReduceOp.MAX)
    return int(one)


def gather(content: bytes) -> list[bytes]:
    """What each process has given, in their order."""
    if _store is None:
        return [content]
    lengths = [torch.tensor(0) for _ in range(launch.world_size())]
    dist.all_gather(lengths, torch.tensor(len(content)))
    padded = torch.frombuffer(bytearray(content.ljust(max(map(int, lengths)), b"\0")), dtype=torch.uint8)
    every = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(every, padded)
    return [one.numpy().tobytes()[:length] for one, length in zip(every, lengths)]


def from_first(content: Optional[bytes]) -> Optional[bytes]:
    """What the first process has given; the others' is not looked at."""
    if _store is None:
        return content
    size = torch.tensor(-1 if content is None else len(content))
    dist.broadcast(size, 0)
    if size < 0:
        return None
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8) if launch.is_main_process() else None
    data = torch.empty(int(size), dtype=torch.uint8) if data is None else data
    dist.broadcast(data, 0)
    return data.numpy().tobytes()


@contextmanager
def together(learn: Learner) -> Iterator[None]:
    """Let all processes train, or validate, what is one process's learner otherwise.

    A loader of the learner has `share`, which gives this process its part of every batch.

    Args:
        learn: with the same network, data and batch size in every process.
    """
    if _store is None:
        yield
        return
    on_cpu = learn.dls.device.type == "cpu"
    # The step is autocast and scaled by the recipe's precision alone; norms' statistics are averaged by `Together`.
    keywords = {
        "sync_bn": False,
        "cpu": on_cpu,
        "mixed_precision": "no",
        "kwargs_handlers": [DistributedDataParallelKwargs(broadcast_buffers=False)],
    }
    loaders = list(learn.dls)
    for loader in loaders:
        loader.shard(launch.rank(), launch.world_size())
        version, numbers, gauss = json.loads(from_first(json.dumps(loader.rng.getstate()).encode()))
        loader.rng.setstate((version, tuple(numbers), gauss))  # one order of the images in all
    if not launch.is_main_process():  # what is drawn for a whole batch; network and order are the same everywhere
        set_seed(random.getrandbits(31) + launch.rank())
    # Neither concerns a user: an argument's other name in newer versions of PyTorch, and strides of axes of length one.
    for message in (".*`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides"):
        warnings.filterwarnings("ignore", message)
    try:
        with learn.distrib_ctx(**keywords), learn.added_cbs(Together()):
            # fastai's own shares repeat images to make parts equal, and come by way of CUDA.
            learn.distributed_trainer._wrap_dl = lambda loader: loader
            yield
    finally:
        for loader in loaders:
            loader.shard(0, 1)


class Together(Callback):
    """Makes of the processes' losses, metrics, penalties and norms' statistics those of the whole batch or set."""

    order = 5.5  # after AnnealGates (5) has added the penalty, before GradientAccumulation (6) counts

    def after_loss(self):
        if not self.training:
            return
        weight = self.dl.weight(self.iter)
        if weight != 1:  # in the last batch, whose parts can differ by an image
            self.learn.loss_grad, self.learn.loss = self.learn.loss_grad * weight, self.learn.loss * weight

    def average(self) -> None:
        """Replace what each process averages over its own images, until now, by the processes' mean.

        The averages are linear: it does not matter when, or how often, this is done.
        """
        networks = [get_model(self.model)]
        if hasattr(self.learn, "average_weights"):
            networks.append(self.learn.average_weights.averaged)
        for network in {id(network): network for network in networks}.values():
            statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
            if statistics:
                means = _mean(torch.cat([buffer.flatten() for buffer in statistics]))
                for buffer, mean in zip(statistics, means.split([buffer.numel() for buffer in statistics])):
                    buffer.copy_(mean.view_as(buffer))
        gates = getattr(self.learn, "anneal_gates", None)
        if gates and gates.steps:
            gates.penalty = _mean(gates.penalty)

    def after_train(self):
        self.average()

    def before_validate(self):
        # Parts can differ by a batch, and the wrapper may wait for the others' buffers at each.
        self.wrapped, self.learn.model = self.learn.model, get_model(self.learn.model)

    def after_validate(self):
        self.learn.model = self.wrapped
        metrics = [one for one in [self.recorder.loss, *self.learn.metrics] if hasattr(one, "total")]
        sums = [number for metric in metrics for number in (float(metric.total), float(metric.count))]
        sums = torch.tensor(sums, dtype=torch.float64)
        dist.all_reduce(sums)
        for metric, (total, count) in zip(metrics, sums.view(-1, 2)):
            metric.total, metric.count = total, int(count)


def _mean(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / launch.world_size()
