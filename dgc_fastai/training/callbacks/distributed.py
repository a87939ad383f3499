"""What several processes compute on their shards, reduced to what one process would compute."""

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import get_model

from ..collectives import all_reduce_mean, has_process_group
from .order import REDUCE_OVER_PROCESSES
from .stateful import defines


def average_over_processes(learn: Learner) -> None:
    """Replace what each process averages over its own images, until now, by the mean over processes.

    These are the statistics of normalization layers, and what callbacks average (see `stateful`). Does nothing in a
    single process.
    """
    if not has_process_group():
        return
    average_buffers(get_model(learn.model))
    for callback in learn.cbs:
        if defines(callback, "average_over_processes"):
            callback.average_over_processes()


def average_buffers(network: torch.nn.Module) -> None:
    """Replace the floating-point buffers of a network by their mean over processes."""
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if statistics:
        means = all_reduce_mean(torch.cat([buffer.flatten() for buffer in statistics]))
        for buffer, mean in zip(statistics, means.split([buffer.numel() for buffer in statistics])):
            buffer.copy_(mean.view_as(buffer))


class ReduceOverProcesses(Callback):
    """Reduces losses, metrics and averages over processes; `distributed_context` adds it."""

    order = REDUCE_OVER_PROCESSES

    def after_loss(self):
        if not self.training:
            return
        weight = self.dl.weight(self.iter)
        if weight != 1:  # in the last batch, whose shards can differ by an image
            self.learn.loss_grad, self.learn.loss = self.learn.loss_grad * weight, self.learn.loss * weight

    def after_train(self):
        average_over_processes(self.learn)

    def before_validate(self):
        # Unwrapped: shards can differ by a batch, and the wrapper may wait for the other processes' buffers in each.
        self.wrapped, self.learn.model = self.learn.model, get_model(self.learn.model)

    def after_validate(self):
        self.learn.model = self.wrapped
        metrics = [one for one in [self.recorder.loss, *self.learn.metrics] if hasattr(one, "total")]
        numbers = [number for metric in metrics for number in (float(metric.total), float(metric.count))]
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        for metric, (total, count) in zip(metrics, sums.view(-1, 2)):
            metric.total, metric.count = total, int(count)
