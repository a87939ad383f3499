"""Errors that the command line reports in one line: what is wrong, where, and what to do."""

import re

from .text import one_line

__all__ = [
    "CheckpointError",
    "Interrupted",
    "LostProcess",
    "RecipeError",
    "TrainingError",
    "UserError",
    "WriteError",
    "dead_reader",
    "out_of_memory",
]


OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|STATUS_ALLOC_FAILED", re.I)


def out_of_memory(error: BaseException) -> str | None:
    """One line about an error of PyTorch or Python that means that memory is full; None for any other error."""
    text = one_line(error)
    if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(text):
        return None
    amount = re.search(r"tried to allocate ([\d.]+) ([KMG]iB|bytes)", text, re.I)
    size = f" ({amount[1]} {amount[2]} more were asked for)" if amount else ""
    where = "on the GPU" if re.search(r"CUDA|CUBLAS|CUDNN|HIP|MPS", text) else "in main memory"
    return (
        f"out of memory {where}{size}; lower data.batch_size, with train.accumulate for the same optimizer step, set "
        "train.precision=bf16 or model.memory_efficient=true, or free what other programs hold"
    )


def dead_reader(error: BaseException) -> str | None:
    """What it means if an error of PyTorch is that a loader's process has died; None for any other error."""
    is_one = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    return "a process that reads images has died, possibly for lack of memory" if is_one else None


class UserError(ValueError):
    """An error the user can fix. The command line prints its message and exits with code 2."""

    def __init__(self, *args):
        super().__init__(*args)
        self._line = super().__str__()

    def __str__(self):
        return self._line  # fastai overwrites `args` of exceptions raised in callbacks


class RecipeError(UserError):
    """An invalid recipe, or one that needs data or a device that is not there."""


class CheckpointError(UserError):
    """A file that is not a checkpoint, is damaged, or belongs to another network."""


class TrainingError(UserError):
    """A training run that failed, for example because its loss is NaN or Inf."""


class WriteError(UserError):
    """A file that cannot be written, for example on a full disk. An existing file stays unchanged."""


class LostProcess(Exception):
    """A process that trains with this one, or a data loading worker, has died."""


class Interrupted(Exception):
    """A run that was stopped by a signal and saved. Args: the message and the signal number."""
