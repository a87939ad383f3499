"""The tests of tests/gpu are collected only by `-m gpu`, run on a CPU as well, and end with a block to paste."""

import os
import subprocess
import sys

from helpers import ROOT

QUICK = "near_one or left_and_begun or scaled_inputs-float32"


def run(*options, **environment):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_dry_run_of_some():
    code, output = run("-m", "gpu", "-k", QUICK, DGC_GPU_TESTS_ON="cpu")
    assert code == 0, output
    block = output.split("paste this into a bug report")[1]
    assert "passed: 3" in block and "scaled_inputs, float32: largest error" in block and "torch" in block


def test_they_are_not_collected_otherwise():
    code, output = run("--collect-only", "tests/gpu")
    assert code == 5 and "no tests" in output
