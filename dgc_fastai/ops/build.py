"""Building the C++ kernel, once on each machine, into the user's cache."""

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["SOURCE", "build", "cache_folder", "compiler_commands", "library_file"]

SOURCE = Path(__file__).parent / "csrc" / "kernel.cpp"
VECTORS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]}

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where the user's machine keeps what is built or measured once. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgc_fastai"


def compiler_commands() -> tuple[list[str], list[str]]:
    """How to compile the kernel and how to link it, without the names of object file and library.

    CXX, CXXFLAGS and LDFLAGS are respected.

    Raises:
        OSError: there is no compiler.
    """
    if platform.system() == "Windows":
        raise OSError("not on Windows yet")
    compiler = shutil.which(os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++"))
    if compiler is None:
        raise OSError("there is no C++ compiler")
    torch_folder = Path(torch.__file__).parent
    compiling = [compiler, "-O3", "-std=c++17", "-fPIC", *VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    compiling += shlex.split(os.environ.get("CXXFLAGS", ""))
    compiling += ["-isystem", str(torch_folder / "include"), "-c", str(SOURCE)]
    if platform.system() == "Linux":
        # Not for linking: the kernel is to use the OpenMP that PyTorch has loaded, with its threads.
        compiling.append("-fopenmp")
    linking = [compiler, "-shared", *shlex.split(os.environ.get("LDFLAGS", ""))]
    return compiling, [*linking, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]


def library_file() -> Path:
    """Where the library is, or will be: its name depends on the sources, PyTorch's version and the commands.

    Raises:
        OSError: there is no compiler.
    """
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.iterdir()))
    key = hashlib.sha256(sources + repr((torch.__version__, *compiler_commands())).encode()).hexdigest()[:16]
    return cache_folder() / f"cpu-{key}.so"


def build() -> Path:
    """The library; built if this version of the sources, of PyTorch and of the commands is not in the cache.

    Raises:
        OSError: there is no compiler, or nowhere to write.
        subprocess.SubprocessError: the compiler failed.
    """
    compiling, linking = compiler_commands()
    target = library_file()
    folder = target.parent
    if not target.exists():
        # A warning, since these are shown, and ten seconds of silence would need an explanation.
        log.warning("Building the C++ kernel for DGC layers, once, in %s: takes about ten seconds", folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may build at the same time
            run = functools.partial(subprocess.run, cwd=scratch, check=True, capture_output=True, text=True)
            run([*compiling, "-o", "cpu.o"])
            run([linking[0], "cpu.o", *linking[1:], "-o", target.name])
            os.replace(Path(scratch) / target.name, target)
    return target
