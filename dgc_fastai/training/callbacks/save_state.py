"""Saving a run so that it resumes to the same bits."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import get_model

from ...utils import launch
from ..collectives import all_reduce_max
from ..state_file import restore_random_state, state_error, write_state
from .distributed import average_over_processes
from .order import SAVE_STATE
from .stateful import stateful_callbacks


class SaveState(Callback):
    """Saves the whole state of a run before its first step, after every epoch, and when it is asked to stop.

    The state is everything that the rest of the run depends on: the network, the optimizer, random numbers, the
    position in the data, fastai's smoothed loss, and what each callback returns as its own (see `stateful`). The order
    of the data and the augmentation of image files follow from the seed and the epoch.

    The file is removed when the run is complete, so it exists exactly where something is left to do. The main process
    writes it; the random numbers are those of each process.

    Args:
        path: the file to keep.
        seed: of the data's order.
        state: from `read_state`, where a run resumes.
    """

    order = SAVE_STATE

    def __init__(self, path: Path, seed: int, state: dict[str, Any] | None = None):
        self.path, self.seed, self.state = path, seed, state
        self.stop: int | None = None
        """The number of the signal that asks to stop."""
        self.stopped: str | None = None
        """Where the run has been stopped."""

    @property
    def first_epoch(self) -> int:
        """The epoch that the fit has to begin with."""
        return self.state["epoch"] if self.state else 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM stop the run at the next batch, saved, and the second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _) -> None:
            self.stop = number
            signal.signal(number, before[signal.Signals(number)])

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def before_fit(self):
        self.is_complete = False

    def before_train(self):
        self.network = get_model(self.learn.model)  # in validation, the learner may hold averaged weights
        state, self.state = self.state, None
        self.done = state["batch"] if state else 0
        self.dls.train.set_epoch(self.seed, self.epoch, self.done)
        if state:
            try:
                self._restore(state)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise state_error(self.path, f"it does not fit this run: {error}") from None
        elif self.epoch == 0:
            self._save(0, 0)

    def before_batch(self):
        if self.training:
            self.learn.iter += self.done

    def after_batch(self):
        # Several processes stop in training only: their shards of the validation images can differ by a batch.
        if (self.training or launch.world_size() == 1) and self._has_to_stop():
            batches = len(self.dls.train)
            batch = self.iter + 1 if self.training else batches
            self._save(self.epoch, batch)
            self.stopped = f"in epoch {self.epoch + 1} of {self.n_epoch}, after {batch:,} of {batches:,} batches"
            raise CancelFitException

    def after_epoch(self):
        if self.epoch + 1 == self.n_epoch:
            self.is_complete = True
            return
        self._save(self.epoch + 1, 0)
        if self._has_to_stop():
            self.stopped = f"after epoch {self.epoch + 1} of {self.n_epoch}"
            raise CancelFitException

    def after_fit(self):
        if self.is_complete and launch.is_main_process():
            self.path.unlink()

    def _has_to_stop(self) -> bool:
        self.stop = all_reduce_max(self.stop or 0) or None  # all processes at the same batch, whichever was asked
        return self.stop is not None

    def _save(self, epoch: int, batch: int) -> None:
        loss, learn = self.recorder.smooth_loss, self.learn
        average_over_processes(learn)
        state = {
            "epoch": epoch,
            "batch": batch,
            "network": self.network.state_dict(),
            "optimizer": learn.opt.opt.state_dict(),
            "pct_train": learn.pct_train,
            "train_iter": learn.train_iter,
            "smooth_loss": (loss.count, float(loss.val)),
            "callbacks": {key: callback.state_dict() for key, callback in stateful_callbacks(learn.cbs).items()},
        }
        write_state(self.path, state)

    def _restore(self, state: dict[str, Any]) -> None:
        loss, learn = self.recorder.smooth_loss, self.learn
        callbacks = stateful_callbacks(learn.cbs)
        missing, unknown = callbacks.keys() - state["callbacks"].keys(), state["callbacks"].keys() - callbacks.keys()
        if missing or unknown:
            problems = [f"the callback {key} is not in the file" for key in sorted(missing)]
            problems += [f"{key} in the file is no callback of the run" for key in sorted(unknown)]
            raise ValueError(", ".join(problems))
        self.network.load_state_dict(state["network"])
        learn.opt.opt.load_state_dict(state["optimizer"])
        if state["batch"]:  # at the beginning of an epoch, fastai has set it, without the rounding of the steps before
            learn.pct_train = state["pct_train"]
        learn.train_iter = state["train_iter"]
        loss.count, value = state["smooth_loss"]
        loss.val = torch.tensor(value)
        for key, callback in callbacks.items():
            callback.load_state_dict(state["callbacks"][key])
        restore_random_state(state)
