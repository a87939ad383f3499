"""The Triton kernels around the convolution compile for GPUs, here without one, and read 16 bytes at a time."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dgc_fastai

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

KERNELS = Path(dgc_fastai.__file__).parent / "ops" / "backends" / "triton_layer.py"

# Runs without the interpreter and without a GPU: launches only compile, for exactly the types, strides and sizes of
# the tensors given.
COMPILE = """
import importlib
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

try:
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Target:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[2]), 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    kernels = []
    JITFunction.__getitem__ = lambda self, grid: lambda *args, **keywords: kernels.append(
        self.run(*args, grid=grid, warmup=True, **keywords)
    )
    driver.set_active(Target())
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    assert ptxas.exists()
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(77)

# The file and its neighbours alone: to import the whole package takes longer than to compile the kernels.
folder = Path(sys.argv[1]).parent
for name, path in (("ops", folder.parent), ("ops.backends", folder)):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [str(path)]
layer = importlib.import_module("ops.backends.triton_layer")
passes = importlib.import_module("ops.backends.triton_passes")
Norm = importlib.import_module("ops.backends.base").Norm

def spilled(kernel):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        target = re.search(r"^\\.target (\\w+)", kernel.asm["ptx"], re.M).group(1)
        command = [ptxas, "-v", "--gpu-name", target, file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\\d+) bytes spill stores", report).group(1))

def wide(kernel, what):
    return len(re.findall(rf"\\b{what}\\.global[.\\w]*\\.v4\\.b32", kernel.asm["ptx"]))

def compile(batch, channels, size, dtype=torch.bfloat16, heads=4, rate=16, last=True, norm=True, by_16_bytes=True):
    x = torch.zeros(batch, channels, *size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    units = max(1, channels // rate)
    shapes = (heads, units, channels), (heads, channels, units), (heads, channels)
    weights = layer.Gates(*map(torch.zeros, shapes))
    batch_norm = layer.Norm(*torch.zeros(4, channels), torch.tensor(0), 0.1, 1e-5, True) if norm else None
    selected = layer.select(x, weights, torch.tensor(0), batch_norm)
    partial = torch.zeros(3, channels) if norm else None
    filters = torch.zeros(64, channels, 3, 3)
    in_parts = torch.zeros(3, filters.numel())
    upstream = layer.Upstream(x, in_parts, selected.gates, partial, partial, selected.penalty)
    layer.backward(x, filters, weights, batch_norm, selected, upstream)
    names = [kernel.metadata.name for kernel in kernels]
    assert names == ["_statistics"] * norm + ["_select", "_select_backward", "_finish_backward"], names
    for kernel in kernels:
        about = kernel.metadata.name, dtype, channels, size
        assert spilled(kernel) <= 8, about  # a pointer of a launch's arguments
        if kernel.metadata.name != "_select_backward":  # which does not read x
            assert not by_16_bytes or wide(kernel, "ld"), about
    assert not by_16_bytes or wide(kernels[-1], "st"), about
    kernels.clear()

def compile_evaluation(batch, channels, size, heads=4, last=True):
    x = torch.zeros(batch, channels, *size, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weights = layer.Gates(*map(torch.zeros, ((heads, 4, channels), (heads, channels, 4), (heads, channels))))
    norm = layer.Norm(*torch.zeros(4, channels), None, 0.1, 1e-5, False)
    selected = layer.select(x, weights, torch.tensor(0), norm)
    upstream = layer.Upstream(x, torch.zeros(3, 576 * channels), selected.gates, *torch.zeros(2, 3, channels), None)
    layer.backward(x, torch.zeros(64, channels, 3, 3), weights, norm, selected, upstream)
    names = [kernel.metadata.name for kernel in kernels]
    assert names == ["_select", "_select_backward", "_finish_backward"], names
    kernels.clear()

def compile_passes(batch, channels, size, heads, norm):
    x = torch.zeros(batch, channels, *size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    norm, gates = Norm(*torch.zeros(2, channels)) if norm else None, torch.zeros(batch, heads, channels)
    passes.combine(x, norm, gates, list(passes.scale(x, norm, gates)))
    passes.combine(x, norm, None, [passes.scale(x, norm, None)])
    weight = torch.zeros(32, channels, 1, 1, dtype=torch.bfloat16)
    passes.filter_gradients(torch.zeros(batch, 32, channels, 1, 1, dtype=torch.bfloat16), weight, gates)
    for kernel in kernels:
        about = kernel.metadata.name, channels, size
        assert spilled(kernel) <= 8 and wide(kernel, "ld"), about
        assert wide(kernel, "st") or kernel.metadata.name == "_filter_gradients", about
    kernels.clear()

def versions():
    kernels = layer._statistics, layer._select, layer._select_backward, layer._finish_backward
    return [sum(len(compiled[0]) for compiled in kernel.device_caches.values()) for kernel in kernels]

if sys.argv[2] == "90":
    compile(256, 64, (56, 56))
    before = versions()
    compile(203, 64, (56, 56))  # a smaller last batch
    assert before == versions() == [1] * 4, (before, versions())
    compile(64, 24, (32, 32), rate=8)
    compile_passes(64, 64, (56, 56), 4, True)
else:
    compile(256, 512, (7, 7))
    compile_passes(64, 24, (32, 32), 4, False)
    compile(64, 32, (16, 16), torch.float32, last=False, norm=False)
    compile(1, 5, (1, 3), torch.float32, heads=3, rate=2, by_16_bytes=False)
    compile_evaluation(64, 64, (14, 14), last=False)
compile_evaluation(64, 64, (56, 56))
for norm in (True, False):
    compile(64, 512, (1, 1), norm=norm, by_16_bytes=False)  # of a ResNet's last stage at 32 px
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(tmp_path, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(KERNELS), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"this Triton does not compile without a GPU: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
