"""What a callback implements to be saved and resumed with its run.

`state_dict()` returns everything that the rest of the run depends on, as values that `torch.save` stores and
`torch.load(weights_only=True)` reads. It is called before the first step, after any batch, and after an epoch, when
what is counted per epoch has to be reset already. `load_state_dict(state)` is called in `before_train` of the epoch
that is resumed, after all other callbacks' `before_train`.

`state_key`, a class attribute, names the state in the file, so that a class can be renamed; without it, the name that
fastai gives the callback is taken.

`average_over_processes()`, which a callback can implement beside, replaces what this process has averaged over its own
images by the mean over processes. Averages are linear, so it does not matter when, or how often, this is done.
"""

from collections.abc import Iterable
from typing import Any

from fastai.callback.core import Callback

__all__ = ["defines", "stateful_callbacks"]


def defines(callback: Callback, method: str) -> bool:
    """Whether the class of a callback has a method. An instance would also find that of the learner's model."""
    return callable(getattr(type(callback), method, None))


def stateful_callbacks(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """The callbacks with a state, by the key of their state.

    Raises:
        ValueError: two callbacks have one key, so that one would overwrite the other's state.
    """
    found: dict[str, Any] = {}
    for callback in callbacks:
        if defines(callback, "state_dict") and defines(callback, "load_state_dict"):
            key = getattr(type(callback), "state_key", callback.name)
            if key in found:
                raise ValueError(f"two callbacks save their state as {key!r}")
            found[key] = callback
    return found
