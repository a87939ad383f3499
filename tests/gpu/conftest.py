"""What only a GPU can settle: `python -m pytest -m gpu`. docs/gpu.md says what to do with its output."""

import importlib.metadata
import subprocess

import pytest
import torch

from helpers import ROOT
from helpers.gpu import DEVICE, DRY_RUN


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.path.relative_to(ROOT / "tests").parts:
            item.add_marker(pytest.mark.gpu)
            if not DRY_RUN and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU that this PyTorch can use"))


@pytest.fixture(autouse=True)
def clean_device(monkeypatch, tmp_path):
    """The tests measure and cache for themselves, multiply float32 exactly, and leave no memory behind."""
    if not DRY_RUN:  # where it would only compile the C++ kernel again
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def report(record_property):
    """`report(name, value)`: a line of the block that ends the run."""
    return lambda name, value: record_property(name, value if isinstance(value, str) else f"{value:.3g}")


@pytest.fixture(scope="session")
def triton():
    """Skips the test if Triton cannot launch a kernel here; it needs a C compiler for that."""
    pytest.importorskip("triton")
    from dgc_fastai.ops.backends.triton_support import triton_runs

    if not triton_runs(torch.ones(1, device=DEVICE)):
        pytest.skip("Triton launches no kernel here: see its warning")


def pytest_terminal_summary(terminalreporter):
    """Everything that a report of a bug needs, to be copied."""
    reports = [one for group in terminalreporter.stats.values() for one in group if hasattr(one, "user_properties")]
    if not any("gpu/" in one.nodeid for one in reports):
        return
    lines = [*_machine(), ""]
    for outcome in ("failed", "error", "skipped"):
        for one in terminalreporter.stats.get(outcome, []):
            lines.append(f"{outcome}: {one.nodeid.split('gpu/')[-1]}: {_reason(one)}")
    lines.append(f"passed: {len(terminalreporter.stats.get('passed', []))}")
    found = {name: value for one in reports for name, value in one.user_properties}
    lines += ["", *(f"{name}: {value}" for name, value in found.items())]
    terminalreporter.section("paste this into a bug report")
    terminalreporter.line("```text")
    for line in lines:
        terminalreporter.line(line)
    terminalreporter.line("```")


def _machine() -> list[str]:
    names = ("dgc_fastai", "torch", "torchvision", "triton", "timm", "fastai")
    versions = {name: _version(name) for name in names}
    lines = [", ".join(f"{name} {version}" for name, version in versions.items()), f"commit {_commit()}"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(DEVICE)
        lines.append(
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
            f"cuDNN {torch.backends.cudnn.version()}"
        )
    else:
        lines.append("no GPU")
    return lines


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _reason(report) -> str:
    if isinstance(report.longrepr, tuple):  # a skip
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else str(report.longrepr)).split())[:300]
