"""Errors that the command line reports in one line: what is wrong, where, and what to do."""

__all__ = [
    "CheckpointError",
    "Interrupted",
    "LostProcess",
    "RecipeError",
    "TrainingError",
    "UserError",
    "WriteError",
]


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
