"""A user's mistakes. Their message is one line: what is wrong, where, and what to do."""

__all__ = ["CheckpointError", "Interrupted", "LostProcess", "RecipeError", "TrainingError", "UserError"]


class UserError(ValueError):
    """A mistake that the user can mend; the command line answers it with its message and exit code 2."""


class RecipeError(UserError):
    """A recipe that says what cannot be, or points to what is not there."""


class CheckpointError(UserError):
    """A file that is no checkpoint, is damaged, or belongs to another network."""


class TrainingError(UserError):
    """A training that has gone wrong, such as one whose loss is no number any more."""


class LostProcess(Exception):
    """One of the processes that train together, or that read the data, has died."""


class Interrupted(Exception):
    """A run that was told to stop, and is saved. Args: what to tell, and the signal's number."""
