"""Where the tests of tests/gpu run: on a GPU, or, with DGC_GPU_TESTS_ON=cpu, small and on the CPU, as a dry run."""

import os

import pytest
import torch

__all__ = ["DEVICE", "DRY_RUN", "needs_gpu", "on_device", "relative_error"]

DRY_RUN = os.environ.get("DGC_GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda:0")

needs_gpu = pytest.mark.skipif(DRY_RUN, reason="a CPU has nothing like it")


def on_device(*values):
    """Tensors, modules or None, moved."""
    return [value if value is None else value.to(DEVICE) for value in values]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value expected."""
    found, expected = found.detach().double(), expected.detach().double()
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
