"""The file that an interrupted run resumes from: writing it, reading it, and the random numbers in it."""

import io
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..utils import launch
from ..utils.errors import CheckpointError
from ..utils.files import write_atomically
from ..utils.text import one_line
from .collectives import all_gather_bytes, broadcast_bytes

__all__ = ["random_state_kept", "read_state", "restore_random_state", "state_error", "write_state"]

FORMAT = 3


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state, with every process's random state, atomically. All processes call it; the main one writes.

    Raises:
        WriteError: the file cannot be written; an older one at `path` is then intact.
    """
    random_states = [_from_bytes(content) for content in all_gather_bytes(_to_bytes(_random_state()))]
    if launch.is_main_process():
        write_atomically(path, _to_bytes({"format": FORMAT, "random": random_states, **state}))


def read_state(path: Path) -> dict[str, Any]:
    """The state of an interrupted run. Only the main process reads the file; all processes return its content.

    Raises:
        CheckpointError: the file is missing or damaged, or was written by another version.
    """
    try:
        content = None
        if launch.is_main_process():
            content = path.read_bytes()
            with zipfile.ZipFile(io.BytesIO(content)) as file:
                wrong = file.testzip()  # torch writes checksums, but does not compare them
            if wrong:
                raise ValueError(f"{wrong} is not what was written")
        state = _from_bytes(broadcast_bytes(content) or b"")
    except Exception as error:  # torch has no common error for what can be wrong with a file
        raise state_error(path, f"damaged, or not a state of a run: {error}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise state_error(path, "not a state of a run")
    if state["format"] != FORMAT:
        raise state_error(path, f"another version wrote it (format {state['format']}; this one reads {FORMAT})")
    return state


def state_error(path: Path, reason: str) -> CheckpointError:
    """The error of a state that cannot be resumed from, with what to do."""
    reason = one_line(reason)[:150]
    remedy = "move it away, and --resume takes the next older run, or starts one"
    return CheckpointError(f"{path}: cannot resume from it: {reason}; {remedy}")


def restore_random_state(state: dict[str, Any]) -> None:
    """Set this process's random numbers to those of a state.

    A run may resume with more processes than it was saved with, though not to the same bits; the additional ones keep
    the random numbers they have.
    """
    if launch.rank() >= len(state["random"]):
        return
    _set_random_state(state["random"][launch.rank()])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Within this context, random numbers may be drawn; the next one after it is what it would have been without."""
    before = _random_state()
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(own: dict[str, Any]) -> None:
    version, keys, gauss = own["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(own["numpy"]))
    torch.set_rng_state(own["torch"])
    if own["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(own["cuda"])


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        # Not in a run on the CPU, which would begin to use a GPU.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _to_bytes(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _from_bytes(content: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
