"""Training on an accelerator that computes, without one: see helpers/simulated_accelerator.py."""

import os
import subprocess
import sys

import pytest
from torch.utils import backend_registration

from helpers import ROOT

TESTS = "tests/training/on_simulated_accelerator.py"
IS_POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@pytest.mark.skipif(not IS_POSSIBLE, reason="this version of PyTorch cannot have a device that is written in Python")
def test_on_a_simulated_accelerator():
    """In a process of its own, which has that accelerator as long as it lives."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", TESTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
