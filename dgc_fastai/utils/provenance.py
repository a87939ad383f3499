"""What a process is: its command, the versions of the packages, the commit, the processor. Imports no torch."""

import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .invocation import program

__all__ = ["command_line", "describe_process", "git_commit", "processor_name"]

PACKAGES = ("torch", "torchvision", "timm", "fastai")


def describe_process() -> dict[str, Any]:
    """The command, the time, the versions and the processor of this process; None for what cannot be told."""
    return {
        "command": command_line(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": git_commit(),
        "versions": {
            "dgc_fastai": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "processor": processor_name(),
    }


def command_line() -> str:
    """The command that started this process, as one types it in a shell."""
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name in ("app.py", "dgc", "__main__.py"):
        return f"{program()} {shlex.join(sys.argv[1:])}".strip()
    return shlex.join(sys.orig_argv)


def git_commit() -> str | None:
    """The commit of the clone that this package is in; None for an installed package."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def processor_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another operating system, or a processor without a model name
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
