"""A fastai DataLoader that can resume at any batch of an epoch and be sharded over processes."""

import math
import random
import signal

import torch
from fastai.data.core import TfmdDL
from fastai.torch_basics import to_detach

__all__ = ["EpochDL"]


class EpochDL(TfmdDL):
    """A TfmdDL that can start at any batch of any epoch, and continues as if it had reached it by itself.

    When several processes train together, each takes its shard of every batch: the global batches are the same for
    any number of processes.
    """

    bs: int

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skip, self.item_seed, self.indices = 0, 0, []
        self.rank, self.world_size = 0, 1
        # Starting an iterator draws a seed for its workers. Draw it from a generator of our own, not the global one.
        self.fake_l.generator = torch.Generator()

    def set_epoch(self, seed: int, epoch: int, skip: int = 0) -> None:
        """Make the next iteration that of an epoch (from 0) of a run with a seed, without its first `skip` batches."""
        self.rng, self.skip = random.Random(f"{seed} {epoch}"), skip

    def wif(self):
        # In a worker: a terminal or a scheduler signals the whole process group, but the main process has to save
        # before its workers stop.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def randomize(self):
        super().randomize()
        self.item_seed = self.rng.getrandbits(48)

    def shard(self, rank: int, world_size: int) -> None:
        """Take this process's shard of every batch from now on; `shard(0, 1)` takes whole batches again."""
        self.bs = self.bs * self.world_size // world_size  # the batch size that fastai and the workers see
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return math.ceil(self.n / (self.bs * self.world_size))

    def get_idxs(self):
        skip, self.skip = self.skip, 0
        indices = super().get_idxs()
        if self.world_size > 1:
            indices = [index for number in range(len(self)) for index in self._shard_of(indices, number)]
        self.indices = indices
        return indices[skip * self.bs :]

    def _shard_of(self, indices: list[int], number: int) -> list[int]:
        batch = indices[number * self.bs * self.world_size :][: self.bs * self.world_size]
        start, end = self._bounds(len(batch))
        # A process whose shard is empty trains on an image of weight 0 (see `weight`), because the others wait for its
        # gradients. In validation its shard stays empty.
        return batch[start:end] or batch[: self.shuffle]

    def _bounds(self, size: int) -> tuple[int, int]:
        """Start and end of this process's shard of a batch of `size` images."""
        return size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size

    def size(self, number: int) -> int:
        """Number of images in a batch, over all processes."""
        whole = self.bs * self.world_size
        return min(self.n - number * whole, whole)

    def weight(self, number: int) -> float:
        """Weight of this process's mean loss, such that the mean over processes is the mean over the batch.

        It is 1 except in the last training batch, whose shards can differ in size.
        """
        size = self.size(number)
        start, end = self._bounds(size)
        return (end - start) * self.world_size / size

    def batch_names(self, number: int) -> list[str]:
        """The images of a batch of this epoch: paths of files, or indices into a set held in memory."""
        items = getattr(self.dataset, "items", None)
        indices = self.indices[number * self.bs :][: self.bs]
        return [str(index if items is None else items[index]) for index in indices]

    def to_detach(self, b, cpu: bool = True, gather: bool = True):
        # Metrics are summed over processes once per epoch. fastai would gather every batch, and pad it.
        return to_detach(b, cpu, gather=False)
