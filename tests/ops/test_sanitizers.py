"""The C++ kernel compiles without warnings, and random layers run under AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dgc_fastai.ops import build
from helpers import ROOT
from helpers.operators import needs_compiler

# Last of all a result that is too small, so that a sanitizer that notices nothing is noticed.
RUN = """
import os, sys
import torch
from dgc_fastai.ops import kernel
from helpers import random_layers as layers

assert kernel.library() is not None
torch.set_num_threads(2)
layers.training_agrees(40)
layers.inference_agrees(20)
layers.blocks_agree(20)
layers.group_convolutions_agree(20)
layers.stems_agree(10)
sys.stderr.write("no errors\\n")
torch.set_num_threads(1)
layer = layers.PackedLayer(torch.randn(4, 4, 3, 3), None, 2, (1, 1), (1, 1), (1, 1))
x = torch.randn(1, 8, 40, 40)
layer.run("group_conv2d", layer.desc(x.shape), x, torch.empty(1, 4, 39, 40))
"""


@needs_compiler
def test_compiles_without_warnings(monkeypatch, tmp_path):
    monkeypatch.setenv("CXXFLAGS", "-O1 -Wall -Wextra -Werror")
    compiling, _ = build.compiler_commands()
    done = subprocess.run([*compiling, "-o", tmp_path / "kernel.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def sanitizer_libraries():
    """The libraries to load before Python, or None if the compiler has none. That of C++ is among them because
    AddressSanitizer looks for its functions when it starts."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if sys.platform != "linux" or compiler is None:
        return None
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    paths = [Path(done.stdout.strip()) for done in found]
    return paths if all(path.is_absolute() for path in paths) else None


@needs_compiler
def test_random_layers_read_and_write_nothing_out_of_bounds(monkeypatch, tmp_path):
    libraries = sanitizer_libraries()
    if libraries is None:
        pytest.skip("this compiler has no sanitizers")
    flags = "-fsanitize=address,undefined"
    monkeypatch.setenv("CXXFLAGS", f"-O0 -fno-sanitize-recover=undefined {flags}")
    monkeypatch.setenv("LDFLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.build()  # here, since the compiler would be slow with the sanitizers loaded
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "LD_PRELOAD": " ".join(map(str, libraries)),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True)
    assert "no errors" in done.stderr, done.stderr
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr
