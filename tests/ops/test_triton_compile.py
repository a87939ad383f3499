"""The Triton kernels compile for a GPU, here without one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dgc_fastai

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

KERNELS = Path(dgc_fastai.__file__).parent / "ops" / "backends" / "triton_kernels.py"

# Runs without the interpreter and without a GPU: launches only compile, for exactly the types, strides and sizes of
# the tensors given. The interpreter forgives much that the compiler does not, above all sizes and strides of one,
# which the compiler sees as constants.
COMPILE = """
import importlib
import sys
import types
from pathlib import Path

try:
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    kernels = []
    JITFunction.__getitem__ = lambda self, grid: lambda *args, **keywords: kernels.append(
        self.run(*args, grid=grid, warmup=True, **keywords)
    )
    driver.set_active(Hopper())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(77)

# The file and its neighbours alone: to import the whole package takes longer than to compile the kernels.
folder = Path(sys.argv[1]).parent
for name, path in (("ops", folder.parent), ("ops.backends", folder)):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [str(path)]
cuda = importlib.import_module("ops.backends.triton_kernels")
try:
    cuda._lists(torch.zeros(1, 1, 32))
    assert "ptx" in kernels.pop().asm
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(77)

def compile(dtype, batch, heads, channels, filters, size, kernel, stride, padding, norm, last):
    x = torch.zeros(batch, channels, *size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    inputs = x, torch.zeros(batch, heads, channels), torch.zeros(heads * filters, channels, *kernel, dtype=dtype)
    inputs += tuple(torch.zeros(2, channels)) if norm else (None, None)
    geometry = stride, padding, (1, 1)
    cuda.backward(cuda.forward(*inputs, *geometry), *inputs, *geometry)
    names = [kernel.metadata.name for kernel in kernels]
    assert names == ["_list_kept", "_forward", "_list_kept", "_backward_input", "_backward_weight"], names
    for kernel in kernels:
        if kernel.metadata.name != "_list_kept":
            # Tensor cores for the short types, and none for float32: its products are to be IEEE.
            assert ("mma" in kernel.asm["ptx"]) == (dtype != torch.float32), (kernel.metadata.name, dtype)
    kernels.clear()

compile(torch.bfloat16, 2, 4, 256, 48, (32, 32), (1, 1), (1, 1), (0, 0), True, False)
compile(torch.float32, 2, 4, 128, 32, (14, 14), (3, 3), (2, 2), (1, 1), False, True)
compile(torch.float16, 1, 1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), True, False)
compile(torch.float32, 1, 1, 5, 1, (7, 1), (3, 1), (2, 1), (1, 0), True, False)
"""


def test_compiles_for_hopper(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(KERNELS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"this Triton does not compile without a GPU: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
