"""Text for error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message: the known word closest to a misspelt one, or an empty string.

    Args:
        prefix: put before the word that is suggested, such as the section of a key.
    """
    nearest = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else ""


def one_line(message: object) -> str:
    """A message, such as an error's, as one line."""
    return " ".join(str(message).split())
