"""Steps of training: what the host waits for, memory and time against the dense baseline, and the choice of backends.

Times are reported, not asserted: the machine may be busy.
"""

import itertools
import statistics
import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback

from dgc_fastai import DynamicGroupConv2d, build_learner, gate_penalty, load_recipe, set_progress
from dgc_fastai.analysis.timing import Variant, measure_times, peak_memory
from dgc_fastai.ops import use_backend
from helpers import QUICKSTART
from helpers.families import small
from helpers.gpu import DEVICE, DRY_RUN, needs_gpu

# Network, side of the images, batch.
SIZES = [("dgc_resnet18", 224, 256), ("dgc_densenet86", 32, 64), ("dgc_densenet86", 32, 512)]
if DRY_RUN:
    SIZES = [("dgc_resnet18", 32, 2)]


def make(name):
    return (small(name) if DRY_RUN else timm.create_model(name)).to(DEVICE, memory_format=torch.channels_last)


def training_step(model, size, batch):
    """A function that trains one step in bfloat16, and returns the loss on the device."""
    images = torch.randn(batch, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(7, (batch,), device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, fused=True)

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        (loss + 1e-5 * gate_penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


@needs_gpu
@pytest.mark.parametrize("backend", [None, "triton"], ids=["plain", "triton"])
@pytest.mark.parametrize("name", ["dgc_resnet18", "dgc_densenet86"])
def test_a_bare_step_waits_for_nothing(name, backend, request):
    if backend:
        request.getfixturevalue("triton")
    with use_backend(backend or "cudnn"):
        step = training_step(make(name), 64, 8)
        for _ in range(3):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class SyncsOfASteadyStep(Callback):
    """Warnings of PyTorch from the end of the fourth batch to the end of the fifth."""

    order = 1000

    def after_batch(self):
        if self.training and self.iter == 3:
            self.caught = warnings.catch_warnings(record=True)
            self.found = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif self.training and self.iter == 4:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)


@needs_gpu
@pytest.mark.parametrize("precision, most", [("float32", 3), ("bf16", 3), ("fp16", 5)])
def test_a_step_of_a_run_waits_seldom(precision, most, report):
    learn = build_learner(load_recipe(QUICKSTART, ["train.epochs=1", f"train.precision={precision}"]))
    learn.add_cb(watch := SyncsOfASteadyStep())
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    found = [one for one in watch.found if "called a synchronizing" in str(one.message)]
    places = [f"{one.filename.split('site-packages/')[-1]}:{one.lineno}" for one in found]
    report(f"synchronizations of a step, {precision}", " ".join([str(len(places)), *places]))
    assert len(places) <= most, places


@pytest.mark.parametrize("name, size, batch", SIZES)
def test_memory_and_time_against_dense(name, size, batch, report):
    """The issue's bars: step 1.15 x dense with open gates, 1.0 x with closed ones; memory 1.15 x."""
    models = {"dense": make(f"{name}_dense"), "ours": make(name)}
    steps = {key: training_step(model, size, batch) for key, model in models.items()}
    for step, _ in itertools.product(steps.values(), range(3)):
        step()
    peaks = {key: peak_memory(step, DEVICE) for key, step in steps.items()}
    memory = peaks["ours"] / max(peaks["dense"], 1)
    title = f"{name}, {size} px, {batch} images, bf16, channels-last"
    report(f"{title}: peak memory / dense", memory)
    for progress in (0.0, 1.0):
        set_progress(models["ours"], progress)
        variants = [Variant(key, nullcontext, step) for key, step in steps.items()]
        rounds = 1 if DRY_RUN else 7
        times = measure_times(variants, rounds, torch.cuda.synchronize if not DRY_RUN else lambda: None)
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["dense"]))
        milliseconds = 1000 * statistics.median(times["ours"])
        report(f"{title}, progress {progress:g}: step / dense", f"{ratio:.3f} ({milliseconds:.1f} ms)")
    assert memory < (3 if DRY_RUN else 1.15)


@needs_gpu
def test_backends_are_chosen_by_measurement(triton, report):
    from dgc_fastai.ops.measured import cache_file, measured_layers

    layer = DynamicGroupConv2d(64, 64, 3, padding=1).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(16, 64, 56, 56, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        layer(x).sum().backward()
    layers = measured_layers(cache_file(DEVICE))
    assert layers, "nothing was measured"
    for key, entry in layers.items():
        report(f"measured: {key}", f"{entry['backend']} of {entry.get('milliseconds')} ms")
        assert len(entry.get("milliseconds", {})) == 2, "a backend did not run"
