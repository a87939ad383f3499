"""Whole runs by app.py, as a person starts them: their accuracy, and what is left of one that is killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from helpers import QUICKSTART, ROOT
from helpers.gpu import DRY_RUN, needs_gpu, relative_error

DEVICE = "device=cpu" if DRY_RUN else "device=auto"
TINY = ("train.epochs=2", "model.stages=[1,1,1]", "data.batch_size=400") if DRY_RUN else ()


def command(output, *overrides):
    return [sys.executable, str(ROOT / "app.py"), str(QUICKSTART), DEVICE, *TINY, *overrides, f"output={output}"]


def train(output, *overrides):
    done = subprocess.run(command(output, *overrides), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = output.iterdir()
    return folder


@pytest.mark.parametrize("precision", ["float32", "bf16", pytest.param("fp16", marks=needs_gpu)])
def test_the_quickstart_learns_in_every_precision(tmp_path, precision, report):
    if DRY_RUN and precision == "float32":
        pytest.skip("bf16 does for a dry run")
    if precision == "bf16" and not DRY_RUN and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU does not compute in bfloat16")
    best = json.loads((train(tmp_path, f"train.precision={precision}") / "summary.json").read_text())["best"]
    report(f"quickstart, {precision}: top-1", best["top_1"])
    assert best["top_1"] > (0 if DRY_RUN else 0.9)


def test_a_killed_run_resumes(tmp_path, report):
    """To the same bits, where cuDNN's kernels allow it, and in any case to the same accuracy."""
    epochs = () if DRY_RUN else ("train.epochs=6",)
    whole = train(tmp_path / "whole", *epochs)
    parts = tmp_path / "parts"
    process = subprocess.Popen(command(parts, *epochs), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 180
    while not list(parts.glob("*/history.csv")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = parts.iterdir()
    resumed = subprocess.run(
        [sys.executable, str(ROOT / "app.py"), str(folder / "recipe.yaml"), "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    first, second = (load_file(one / "last.safetensors") for one in (whole, folder))
    worst = max(relative_error(second[name].float(), first[name].float()) for name in first)
    report("killed and resumed: largest difference of weights", worst)
    rows = [list(csv.DictReader(open(one / "history.csv"))) for one in (whole, folder)]
    assert len(rows[0]) == len(rows[1])
    assert abs(float(rows[0][-1]["top_1"]) - float(rows[1][-1]["top_1"])) < 0.05
    assert worst == 0 or not DRY_RUN


PROCESS_GROUP = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from dgc_fastai import gate_penalty
from dgc_fastai.training import collectives
from dgc_fastai.training.callbacks.distributed import average_buffers
from helpers.families import small

device = torch.device(sys.argv[2])
collectives._store = store = dist.TCPStore("127.0.0.1", 0, is_master=True)
backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
dist.init_process_group(backend, store=store, rank=0, world_size=1)
assert collectives.all_reduce_max(3) == 3
assert collectives.all_gather_bytes(b"one") == [b"one"] and collectives.broadcast_bytes(b"two") == b"two"
assert torch.equal(collectives.all_reduce_mean(torch.ones(3, device=device)).cpu(), torch.ones(3))
network = small("dgc_densenet22").to(device)
wrapped = DistributedDataParallel(network)
(wrapped(torch.randn(2, 3, 32, 32, device=device)).sum() + gate_penalty(network)).backward()
average_buffers(network)
assert all(one.grad is not None for one in network.parameters())
collectives.destroy_process_group()
print("fine")
"""


def test_nccl_with_one_process():
    device = "cpu" if DRY_RUN else "cuda:0"
    command = [sys.executable, "-c", PROCESS_GROUP, str(ROOT / "tests"), device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "fine" in done.stdout, done.stdout + done.stderr
