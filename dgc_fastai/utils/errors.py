"""A user's mistakes. Their message is one line: what is wrong, where, and what to do."""

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
    """A mistake that the user can mend; the command line answers it with its message and exit code 2."""

    def __init__(self, *args):
        super().__init__(*args)
        self._line = super().__str__()

    def __str__(self):
        return self._line  # fastai writes over the `args` of what a callback raises


class RecipeError(UserError):
    """A recipe that says what cannot be, or points to what is not there."""


class CheckpointError(UserError):
    """A file that is no checkpoint, is damaged, or belongs to another network."""


class TrainingError(UserError):
    """A training that has gone wrong, such as one whose loss is no number any more."""


class WriteError(UserError):
    """A file that cannot be written, as where the disk is full; one that was there is as it was."""


class LostProcess(Exception):
    """One of the processes that train together, or that read the data, has died."""


class Interrupted(Exception):
    """A run that was told to stop, and is saved. Args: what to tell, and the signal's number."""
