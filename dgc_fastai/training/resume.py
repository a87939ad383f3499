"""Where a training run stands, saved so that it can go on from there to the same bits."""

import io
import random
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import get_model

from ..utils import launch
from ..utils.errors import CheckpointError
from ..utils.files import write_atomically
from .distributed import from_first, gather, largest

__all__ = ["Snapshots", "read_state"]

FORMAT = 2


class Snapshots(Callback):
    """Saves the whole state of a run before its first step, after every epoch, and when it is asked to stop.

    The state is everything that the rest of the run depends on: the network, the optimiser, the loss scaler, the
    average of weights, gradients that are being accumulated, random numbers, the place in the data, and what the
    history needs. The order of the data and the augmentation of image files follow from the seed and the epoch.
    The file goes when the run is done, so it is there exactly where something is left to do. Of several processes the
    first writes it; the random numbers are those of each.

    Args:
        path: the file to keep.
        seed: of the data's order.
        record: has `rows` and `started` of the run, which are kept, too.
        state: from `read_state`, where a run goes on.
    """

    order = 80  # after the run folder (70): whatever the state says is done has been written

    def __init__(self, path: Path, seed: int, record: Any, state: Optional[dict] = None):
        self.path, self.seed, self.record, self.state = path, seed, record, state
        self.stop: Optional[int] = None
        self.stopped: Optional[str] = None

    @property
    def first_epoch(self) -> int:
        """The epoch that the fit has to begin with."""
        return self.state["epoch"] if self.state else 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM stop the run at the next batch, saved; the second one stops it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _) -> None:
            self.stop = number
            signal.signal(number, before[number])

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def before_train(self):
        self.network = get_model(self.learn.model)  # while it validates, the learner may hold the averaged one
        state, self.state = self.state, None
        self.done = state["batch"] if state else 0
        self.dls.train.set_epoch(self.seed, self.epoch, self.done)
        if state:
            try:
                self._restore(state)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise _unfit(self.path, f"it does not fit this run: {error}") from None
        elif self.epoch == 0:
            self._save(0, 0)

    def before_batch(self):
        if self.training:
            self.learn.iter += self.done

    def after_batch(self):
        if (self.training or launch.world_size() == 1) and self._is_to_stop():  # parts of the validation differ
            batches = len(self.dls.train)
            batch = self.iter + 1 if self.training else batches
            self._save(self.epoch, batch)
            self.stopped = f"in epoch {self.epoch + 1} of {self.n_epoch}, after {batch:,} of {batches:,} batches"
            raise CancelFitException

    def after_epoch(self):
        if self.epoch + 1 == self.n_epoch:
            return
        self._save(self.epoch + 1, 0)
        if self._is_to_stop():
            self.stopped = f"after epoch {self.epoch + 1} of {self.n_epoch}"
            raise CancelFitException

    def after_fit(self):
        if launch.is_main_process() and len(self.record.rows) == self.n_epoch:
            self.path.unlink()

    def _is_to_stop(self) -> bool:
        self.stop = largest(self.stop or 0) or None  # all processes at the same batch, whichever was asked
        return self.stop is not None

    def _save(self, epoch: int, batch: int) -> None:
        loss, learn = self.recorder.smooth_loss, self.learn
        if hasattr(learn, "together"):
            learn.together.average()
        random = [_from_bytes(state) for state in gather(_to_bytes(_random_state()))]
        if not launch.is_main_process():
            return
        state = {
            "format": FORMAT,
            "epoch": epoch,
            "batch": batch,
            "network": self.network.state_dict(),
            "optimizer": learn.opt.opt.state_dict(),
            "random": random,
            "done": learn.pct_train,
            "steps": learn.train_iter,
            "loss": (loss.count, float(loss.val)),
            "penalty": (learn.anneal_gates.steps, float(learn.anneal_gates.penalty)),
            "rows": self.record.rows,
            "elapsed": time.monotonic() - self.record.started,
        }
        if hasattr(learn, "average_weights"):
            average = learn.average_weights
            state["average"] = average.updates, average.averaged.state_dict()
        if getattr(learn, "scaler", None):
            state["scaler"] = learn.scaler.state_dict()
        if hasattr(learn, "whole_batch_accumulation"):
            gradients = [parameter.grad for parameter in self.network.parameters()]
            state["gradients"] = learn.whole_batch_accumulation.count, gradients
        write_atomically(self.path, _to_bytes(state))

    def _restore(self, state: dict) -> None:
        loss, learn = self.recorder.smooth_loss, self.learn
        self.network.load_state_dict(state["network"])
        learn.opt.opt.load_state_dict(state["optimizer"])
        if state["batch"]:  # fastai has set it for the beginning of an epoch
            learn.pct_train = state["done"]
            learn.anneal_gates.steps, penalty = state["penalty"]
            learn.anneal_gates.penalty = torch.tensor(penalty)
            self.record.started = time.monotonic() - state["elapsed"]
        learn.train_iter = state["steps"]
        loss.count, value = state["loss"]
        loss.val = torch.tensor(value)
        if "average" in state:
            learn.average_weights.updates, average = state["average"]
            learn.average_weights.averaged.load_state_dict(average)
        if "scaler" in state:
            learn.scaler.load_state_dict(state["scaler"])
        if "gradients" in state:
            learn.whole_batch_accumulation.count, gradients = state["gradients"]
            for parameter, gradient in zip(self.network.parameters(), gradients):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
        if launch.rank() < len(state["random"]):  # another number of processes can go on, though not to the same bits
            _set_random_state(state["random"][launch.rank()])


def read_state(path: Path) -> dict:
    """The state of an interrupted run, from its file, which only the first of several processes has to reach.

    Raises:
        CheckpointError: the file is missing, damaged, or of another version.
    """
    try:
        content = None
        if launch.is_main_process():
            content = path.read_bytes()
            with zipfile.ZipFile(io.BytesIO(content)) as file:
                wrong = file.testzip()  # torch does not compare the checksums that it writes
            if wrong:
                raise ValueError(f"{wrong} is not what was written")
        state = _from_bytes(from_first(content))
    except Exception as error:  # torch has no common error for what can be wrong with a file
        raise _unfit(path, f"damaged or no state of a run: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _unfit(path, "not a state that this version wrote")
    return state


def _to_bytes(state: dict) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _from_bytes(content: bytes) -> dict:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _unfit(path: Path, reason: str) -> CheckpointError:
    reason = " ".join(reason.split())[:150]
    remedy = "move it away, and --resume takes the next older run, or starts one"
    return CheckpointError(f"{path}: cannot go on from it: {reason}; {remedy}")


def _random_state() -> dict:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
