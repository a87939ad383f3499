"""The Triton kernels compile for GPUs, here without one, to what makes them fast.

Runs without the interpreter: launches only compile, for exactly the types, strides and sizes of the tensors given. The
interpreter forgives much that the compiler does not, above all sizes and strides of one, which it sees as constants.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dgc_fastai

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

BACKENDS = Path(dgc_fastai.__file__).parent / "ops" / "backends"

# Prints, for each layer, what its kernels are compiled to: a name and a dictionary each.
COMPILE = """
import importlib, json, re, subprocess, sys, tempfile, types
from pathlib import Path

capability, module, layers = int(sys.argv[1]), sys.argv[3], json.loads(sys.argv[4])
try:
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Gpu:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    kernels, described = [], {}
    JITFunction.__getitem__ = lambda self, grid: lambda *args, **keywords: kernels.append(
        self.run(*args, grid=grid, warmup=True, **keywords)
    )
    driver.set_active(Gpu())
    assembler = triton.knobs.nvidia.ptxas.path
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(77)

# The file and its neighbors alone: to import the whole package takes longer than to compile the kernels.
folder = Path(sys.argv[2])
for name, path in (("ops", folder.parent), ("ops.backends", folder)):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [str(path)]
backend = getattr(importlib.import_module("ops.backends.triton"), module)()
from ops.backends.base import Norm
from ops.conv_desc import conv_desc
try:
    importlib.import_module("ops.backends.triton_skipping").list_kept(torch.zeros(1, 1, 32))
    assert "ptx" in kernels.pop().asm
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(77)

def describe(kernel):
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\\.target (\\w+)", ptx)[1]
        command = [assembler, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    def count(pattern):
        return len(re.findall(pattern, ptx))
    return {
        "products": count(r"wgmma\\.mma_async|mma\\.sync"),
        "wide loads": count(r"cp\\.async\\.c[ag][^;]*, 0x10|ld\\.global[.:\\w]*v4\\.b32"),
        "narrow loads": count(r"ld\\.global[.:\\w]*\\.b16"),
        "spilled": int(re.search(r"(\\d+) bytes spill stores", report)[1]),
    }

for dtype, batches, heads, channels, filters, size, kernel, stride, padding, norm, last in layers:
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    dtype = getattr(torch, {"tf32": "float32"}.get(dtype, dtype))
    format = torch.channels_last if last else torch.contiguous_format
    weight = torch.zeros(heads * filters, channels, *kernel, dtype=dtype).contiguous(memory_format=format)
    norm = Norm(*torch.zeros(2, channels)) if norm else None
    seen = {}
    for batch in batches:
        x = torch.zeros(batch, channels, *size, dtype=dtype).contiguous(memory_format=format)
        gates = torch.zeros(batch, heads, channels)
        desc = conv_desc(x.shape, weight.shape, heads, tuple(stride), tuple(padding), (1, 1))
        y = backend.forward(desc, x, gates, weight, norm)
        backend.backward(desc, y, x, gates, weight, norm)
    found = []
    for kernel in kernels:
        if kernel.hash not in described:
            described[kernel.hash] = describe(kernel)
        if kernel.hash not in seen:
            seen[kernel.hash] = True
            found.append((kernel.metadata.name, described[kernel.hash]))
    kernels.clear()
    print(json.dumps(found))
"""


def compiled(folder, capability, backend, *layers):
    """For each layer, the kernels that it needs, in the order of their first launch: names and descriptions.

    A layer is its dtype, batches, heads, channels, filters of a head, size, kernel, stride, padding, and whether there
    is a norm and whether all is channels-last.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-c", COMPILE, str(capability), str(BACKENDS), backend, json.dumps(layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"this Triton does not compile without a GPU: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


RESNET18 = (4, 64, 16, (56, 56), (3, 3), (1, 1), (1, 1), True, True)
RESNET18_DOWN = (4, 64, 32, (56, 56), (3, 3), (2, 2), (1, 1), True, True)
RESNET18_LAST = (4, 512, 128, (7, 7), (3, 3), (1, 1), (1, 1), True, True)
DENSENET86 = (4, 72, 8, (32, 32), (1, 1), (1, 1), (0, 0), True, True)
DENSENET86_NEXT = (4, 88, 8, (32, 32), (1, 1), (1, 1), (0, 0), True, True)
# Sizes of one; and products of float32 that are to be exact, since convolutions may not use TF32.
ODD = [
    ("float32", [2], 4, 128, 32, (14, 14), (3, 3), (2, 2), (1, 1), False, True),
    ("float16", [1], 1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), True, False),
    ("float32", [1], 3, 5, 1, (7, 1), (3, 1), (2, 1), (1, 0), True, False),
    ("bfloat16", [2], 4, 256, 48, (32, 32), (1, 1), (1, 1), (0, 0), True, False),
]
PRODUCTS = {"_forward", "_backward_input", "_backward_weight"}


def check_speed(kernels):
    """Products on tensor cores, of what has been loaded 16 bytes at a time, with their sums in registers."""
    assert {name for name, _ in kernels} >= PRODUCTS
    for name, found in kernels:
        if name in PRODUCTS:
            assert found["products"] and found["wide loads"] >= 4 and not found["narrow loads"], (name, found)
            assert found["spilled"] <= 8, (name, found)  # two registers


def check_batches(kernels):
    """Each kernel is compiled once for all batches, and for all shares of a batch in the gradient of the weight."""
    names = [name for name, _ in kernels]
    assert len(names) == len(set(names)) and set(names) >= PRODUCTS


def check_odd(layers):
    for (dtype, *_), kernels in zip(ODD, layers, strict=True):
        assert {name for name, _ in kernels} >= PRODUCTS
        for name, found in kernels:
            if name in PRODUCTS:
                assert bool(found["products"]) == (dtype != "float32"), (dtype, name)


def test_ampere(tmp_path):
    layers = [("bfloat16", [8], *layer) for layer in (RESNET18, RESNET18_LAST, DENSENET86)]
    for kernels in compiled(tmp_path, 80, "Triton", *layers, ("tf32", [8], *RESNET18)):
        check_speed(kernels)


def test_hopper(tmp_path):
    fast = [("bfloat16", [64, 17], *RESNET18)]
    fast += [("bfloat16", [8], *layer) for layer in (RESNET18_DOWN, DENSENET86, DENSENET86_NEXT)]
    fast += [(dtype, [8], *RESNET18) for dtype in ("float16", "tf32")]
    found = compiled(tmp_path, 90, "Triton", *fast, *ODD)
    for kernels in found[: len(fast)]:
        check_speed(kernels)
    check_batches(found[0])
    assert found[2] == found[3], "layers whose channels have the same power of two share their kernels"
    check_odd(found[len(fast) :])


def test_hopper_skipping_dropped_channels(tmp_path):
    first, *odd = compiled(tmp_path, 90, "TritonSkipping", ("bfloat16", [64, 17], *RESNET18), *ODD)
    check_batches(first)
    check_odd(odd)
