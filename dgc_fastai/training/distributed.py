"""Training one network with several processes (see `collectives`).

Every process takes its shard of each batch, fastai's `distrib_ctx` averages the gradients by PyTorch's
DistributedDataParallel, and a step is the one that a single process would make of the whole batch. Only normalization
layers differ: each process normalizes by its own shard, as is usual.
"""

import json
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import fastai.distributed  # noqa: F401  (adds distrib_ctx to Learner)
from accelerate import DistributedDataParallelKwargs
from fastai.learner import Learner
from fastai.torch_core import set_seed

from ..utils import launch
from .callbacks.distributed import ReduceOverProcesses
from .collectives import broadcast_bytes, has_process_group

__all__ = ["distributed_context"]


@contextmanager
def distributed_context(learn: Learner) -> Iterator[None]:
    """Let all processes train, or validate, one process's learner; nothing in a single process.

    Args:
        learn: with the same network, data and batch size in every process, and loaders of `EpochDL`.
    """
    if not has_process_group():
        yield
        return
    # The recipe's precision alone autocasts and scales the step. ReduceOverProcesses averages the statistics of
    # normalization layers.
    keywords = {
        "sync_bn": False,
        "cpu": learn.dls.device.type == "cpu",
        "mixed_precision": "no",
        "kwargs_handlers": [DistributedDataParallelKwargs(broadcast_buffers=False)],
    }
    loaders = list(learn.dls)
    for loader in loaders:
        loader.shard(launch.rank(), launch.world_size())
        state = broadcast_bytes(json.dumps(loader.rng.getstate()).encode())
        version, numbers, gauss = json.loads(state or b"")
        loader.rng.setstate((version, tuple(numbers), gauss))  # the same order of the images in all processes
    if not launch.is_main_process():
        # Augmentation and dropout draw for a shard at once, so each process needs random numbers of its own. Weights
        # and the order of the images are drawn already.
        set_seed(random.getrandbits(31) + launch.rank())
    # Neither concerns a user: newer versions of PyTorch rename an argument; strides differ for axes of length one.
    for message in (".*`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides"):
        warnings.filterwarnings("ignore", message)
    try:
        with learn.distrib_ctx(**keywords), learn.added_cbs(ReduceOverProcesses()):
            # fastai's own shards repeat images to equal sizes, and are sent through CUDA.
            learn.distributed_trainer._wrap_dl = lambda loader: loader
            yield
    finally:
        for loader in loaders:
            loader.shard(0, 1)
