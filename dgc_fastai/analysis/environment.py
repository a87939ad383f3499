"""What a machine has, for its user and for reports of defects."""

import functools
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..ops.backends.triton_support import triton_version
from ..ops.build import cache_folder, compiler_commands, library_file
from ..ops.device import select_channels_last, select_device, select_precision
from ..ops.measured import cache_file, measured_layers
from ..utils import launch
from ..utils.provenance import git_commit, processor_name

__all__ = ["describe_environment"]

PACKAGES = ("torchvision", "timm", "fastai", "accelerate", "onnxruntime")
# As /proc/cpuinfo writes them, and as the makers do.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "bf16": "NEON bf16",
    "i8mm": "NEON int8",
    "sve": "SVE",
}
GIB = 2**30

Fact = Any  # what JSON can hold


def describe_environment() -> dict[str, dict[str, Fact]]:
    """Facts about this machine by section and name; None for one that cannot be told here.

    Nothing is built, measured or trained.
    """
    sections: dict[str, dict[str, Callable[[], Fact]]] = {
        "versions": _versions(),
        "processor": {
            "name": processor_name,
            "cores": launch.cores,
            "instructions": instruction_sets,
            "threads": torch.get_num_threads,
        },
        "C++ kernel": {"compiler": _compiler, "library": _library, "vectors": torch.backends.cpu.get_cpu_capability},
        **({f"GPU {number}": _gpu(torch.device("cuda", number)) for number in range(_gpu_count())} or _no_gpu()),
        "training": {
            "device": lambda: str(select_device("auto")),
            "precision": lambda: select_precision("auto", select_device("auto")),
            "memory format": lambda: _memory_format(select_device("auto")),
        },
        "space": {
            "free memory": _free_memory,
            "free disk here": lambda: _gib(shutil.disk_usage(".").free),
            "cache": lambda: f"{cache_folder()}, {_cache_size() / 2**20:.1f} MiB",
        },
    }
    return {
        section: {name: _known(function) for name, function in facts.items()} for section, facts in sections.items()
    }


def _known(function: Callable[[], Fact]) -> Fact:
    try:
        return function()
    except Exception:  # one fact that is missing must not hide the others
        return None


def _versions() -> dict[str, Callable[[], Fact]]:
    return {
        "dgc_fastai": _own_version,
        "python": lambda: sys.version.split()[0],
        "platform": platform.platform,
        "torch": lambda: str(torch.__version__),
        **{name: functools.partial(version, name) for name in PACKAGES},
        "triton": triton_version,
    }


def _own_version() -> str:
    commit = git_commit()
    return f"{__version__} ({commit})" if commit else __version__


def instruction_sets() -> list[str]:
    """Vector and matrix instructions of the processor, where Linux tells of them."""
    text = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    found = set(flags[1].split()) if flags else set()
    return [name for flag, name in INSTRUCTIONS.items() if flag in found]


def _compiler() -> str:
    try:
        compiler = compiler_commands()[0][0]
    except OSError as error:
        return str(error)
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=5)
    return f"{compiler}, {done.stdout.splitlines()[0]}"


def _library() -> str:
    try:
        file = library_file()
    except OSError as error:
        return f"cannot be built: {error}"
    return f"built: {file}" if file.exists() else "not built yet: it is at its first use, in some ten seconds"


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _no_gpu() -> dict[str, dict[str, Callable[[], Fact]]]:
    built_for = torch.version.cuda or torch.version.hip
    reason = "no driver or GPU" if built_for else "this torch is built without CUDA"
    return {"GPU": {"found": lambda: f"none: {reason}"}}


def _gpu(device: torch.device) -> dict[str, Callable[[], Fact]]:
    def capability() -> str:
        return ".".join(map(str, torch.cuda.get_device_capability(device)))

    def memory() -> str:
        free, total = torch.cuda.mem_get_info(device)
        return f"{_gib(total)}, {_gib(free)} free"

    def computes() -> list[str]:
        has = torch.cuda.get_device_capability(device)
        return [name for name, least in (("fp16", (7, 0)), ("bf16", (8, 0)), ("TF32", (8, 0))) if has >= least]

    def measured() -> str:
        chosen = Counter(entry["backend"] for entry in measured_layers(cache_file(device)).values())
        counts = ", ".join(f"{name} in {count}" for name, count in chosen.most_common())
        return f"fastest of {chosen.total()} layers: {counts}" if chosen else "no layer yet"

    return {
        "name": lambda: torch.cuda.get_device_name(device),
        "memory": memory,
        "capability": capability,
        "fast types": computes,
        "driver": _driver,
        "CUDA": lambda: f"{torch.version.cuda or torch.version.hip}, cuDNN {torch.backends.cudnn.version()}",
        "measured": measured,
    }


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", file.read_text()) if file.exists() else None
    if found:
        return found[1]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True, timeout=5).stdout.split()[0]


def _memory_format(device: torch.device) -> str:
    return "channels-last" if select_channels_last(None, device) else "channels-first"


def _free_memory() -> str:
    """What Linux would give to a new program; in a container, at most what its limit leaves."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {words[0]: 1024 * int(words[1]) for words in lines}
    total, free = sizes["MemTotal:"], sizes["MemAvailable:"]
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        total, free = min(total, limit), min(free, limit - used)
    return f"{_gib(free)} of {_gib(total)}"


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max"
        return None


def _cache_size() -> int:
    return sum(path.stat().st_size for path in cache_folder().rglob("*") if path.is_file())


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
