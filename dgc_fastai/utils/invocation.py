"""How the user called the command line, for messages that suggest the next command."""

import os
import sys
from pathlib import Path

__all__ = ["display_path", "program"]


def program() -> str:
    """The command as the user typed it: `python app.py`, `python -m dgc_fastai`, or `dgc` anywhere else."""
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name == "app.py":
        return f"python {called}"
    return "python -m dgc_fastai" if called.parts[-2:] == ("dgc_fastai", "__main__.py") else "dgc"


def display_path(path: Path) -> str:
    """A path relative to the working folder if it lies below it, else as it is."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
