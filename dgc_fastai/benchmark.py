"""A recipe's network on the clock: its training step, peak memory and inference beside those of its twins without
gates and of the authors' formulation, on this machine."""

import gc
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import fastai
import timm
import torch
import torch.nn as nn
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .conv import dgc_layers, gate_penalty, set_progress
from .data import FILES, class_names, input_size
from .deploy import deploy
from .display import draw_benchmark, measuring_bar
from .errors import RecipeError, UserError
from .files import write_atomically
from .learner import assemble, build_model, prepare, select_device, use_device
from .ops import use_formulation
from .recipe import Data, Recipe
from .throughput import Source, measure_rates, pipeline_sources, repeat, verdict

__all__ = ["Measurement", "Variant", "benchmark", "benchmark_folder", "plan_benchmark", "plan_data"]

LEAST_SECONDS = 0.1  # between two looks at the clock; what is faster is called several times
MOST_CALLS = 200
BASELINE, AGAIN = "dense", "dense again"  # the same network, first and last of a round
HALF_WAY = "ours at 0.5"


class Variant(NamedTuple):
    """A network in one of its states, and what it is to do."""

    name: str
    setting: Callable[[], AbstractContextManager]
    """Brings the network into its state; entered before the clock starts."""
    call: Callable[[], Any]


class Measurement(NamedTuple):
    """Variants to compare with the first of them."""

    what: str
    batch: int
    variants: list[Variant]
    with_memory: bool


def family(arch: str) -> str:
    """The gated network of a name that may be one of its twins': dgc_resnet18_sgc -> dgc_resnet18."""
    return arch.removesuffix("_dense").removesuffix("_sgc")


def plan_benchmark(recipe: Recipe, compiled: bool = True) -> list[Measurement]:
    """What there is to measure: a training step, inference of one image and of a batch.

    Networks, random images and labels are on the recipe's device, which need not have the recipe's data.

    Args:
        compiled: for inference, also by what torch.compile makes of the networks, which takes it minutes.

    Raises:
        RecipeError: a network, the optimiser or the device cannot be had.
    """
    device = use_device(recipe.device)
    set_seed(recipe.train.seed)
    size, classes = recipe.data.batch_size, _class_count(recipe.data)
    images = torch.randn(size, *input_size(recipe.data), device=device)
    labels = torch.randint(classes, (size,), device=device)
    networks = {}
    for twin in ("", "_dense", "_sgc"):
        model = recipe.model.model_copy(update={"arch": family(recipe.model.arch) + twin})
        network = build_model(recipe.model_copy(update={"model": model}), classes)
        networks[twin] = prepare(network, recipe, device)
    steps = {twin: training_step(recipe, network, images, labels) for twin, network in networks.items()}
    plan = [
        Measurement(
            "training step",
            size,
            [
                Variant(name, partial(_state, networks[twin], True, progress, formulation), steps[twin])
                for name, twin, progress, formulation in _variants((0.0, 0.5, 1.0))
            ],
            with_memory=True,
        )
    ]
    # Copies for inference only: the dense twin in the form that is mostly its fastest, and what `deploy` makes of ours.
    set_progress(networks[""], 1.0)
    dense = deepcopy(networks["_dense"]).eval().to(memory_format=torch.channels_last)
    forms = {f"{BASELINE} channels-last": dense, "deployed": deploy(networks[""])}
    if compiled:
        forms |= {f"{BASELINE} compiled": dense, "deployed compiled": forms["deployed"]}
    for count in sorted({1, size}):
        variants = [
            Variant(
                name,
                partial(_state, networks[twin], False, progress, formulation),
                partial(_infer, recipe, networks[twin], images[:count]),
            )
            for name, twin, progress, formulation in _variants((1.0,))
        ]
        more = [
            Variant(
                name,
                nullcontext,
                partial(_infer, recipe, _compiled(form, device) if "compiled" in name else form, images[:count]),
            )
            for name, form in forms.items()
        ]
        plan.append(Measurement("inference", count, [*variants[:-1], *more, variants[-1]], with_memory=False))
    return plan


def plan_data(recipe: Recipe) -> list[Source]:
    """What there is to measure of a recipe's input: training steps of two networks, and the data pipeline by itself.

    Raises:
        RecipeError: as in `plan_benchmark`, or the data are not there.
    """
    step = plan_benchmark(recipe, compiled=False)[0]
    wait = _waiter(select_device(recipe.device))

    def steps(variant: Variant) -> tuple[int, float]:
        def one() -> int:
            variant.call()
            wait()
            return step.batch

        with variant.setting():
            return repeat(one)

    networks = [variant for variant in step.variants if variant.name in (BASELINE, HALF_WAY)]
    return [
        *(Source(_step_name(variant.name), partial(steps, variant)) for variant in networks),
        *pipeline_sources(recipe, select_device(recipe.device), wait),
    ]


def _step_name(variant: str) -> str:
    return f"training step, {variant}"


def _waiter(device: torch.device) -> Callable[[], None]:
    return (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)


def _compiled(network: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """By torch.compile with frozen weights, for one batch size, and as a CUDA graph on CUDA."""
    return torch.compile(network, dynamic=False, options={"freezing": True, "triton.cudagraphs": device.type == "cuda"})


def _class_count(data: Data) -> int:
    try:
        return len(class_names(data))
    except RecipeError:  # the files are not here, nor needed
        return {"cifar10": 10, "cifar100": 100}.get(data.name, 1000)


def _variants(progresses: Sequence[float]) -> list[tuple[str, str, float, Optional[str]]]:
    """Name, twin, progress and formulation of each; the baseline is there twice, to tell the machine's noise."""
    gated = [
        (f"{name} at {progress:g}", "", progress, formulation)
        for name, formulation in (("reference", "reference"), ("ours", None))
        for progress in progresses
    ]
    return [(BASELINE, "_dense", 0.0, None), ("sgc", "_sgc", 0.0, None), *gated, (AGAIN, "_dense", 0.0, None)]


@contextmanager
def _state(network: nn.Module, training: bool, progress: float, formulation: Optional[str]) -> Iterator[None]:
    network.train(training)
    set_progress(network, progress)
    with use_formulation(formulation):
        yield
    for layer in dgc_layers(network):
        layer.lasso = None  # or the next step would free what this one has allocated


def training_step(recipe: Recipe, network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of the recipe's training, without what may surround it: averages, accumulation, clipping, mixing.

    The learning rate is zero, so that the weights are the same in every round.

    Args:
        images, labels: a batch on the network's device, [B, C, H, W] and [B].
    """
    learn = assemble(recipe, DataLoaders(), network)
    learn.opt.set_hyper("lr", 0.0)
    optimizer, loss_function, lasso = learn.opt.opt, learn.loss_func, recipe.train.lasso
    # A training run soon finds a scale that overflows nowhere; here no step is to be skipped.
    scaler = torch.amp.GradScaler(images.device.type, init_scale=1.0, enabled=recipe.train.precision == "fp16")

    def step() -> None:
        with _autocast(recipe, images.device):
            loss = loss_function(network(images), labels) + lasso * gate_penalty(network)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()  # last, so that gradients count among what a step allocates

    return step


def _infer(recipe: Recipe, network: nn.Module, images: Tensor) -> None:
    with torch.inference_mode(), _autocast(recipe, images.device):
        network(images)


def _autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


# Measuring ------------------------------------------------------------------------------------------------


def measure_times(
    variants: Sequence[Variant],
    rounds: int,
    wait: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of a call of each variant, one number a round, after a round that warms up.

    Every round calls every variant, in turn from the first to the last and from the last to the first: a machine
    that grows slower or faster does so for all alike.

    Args:
        rounds: how many are counted, at least one.
        wait: returns when the device has done its work.
        tell: is told the name of the variant that is next, while no clock runs.
    """

    def seconds(variant: Variant, calls: int) -> float:
        wait()
        began = clock()
        for _ in range(calls):
            variant.call()
            wait()
        return (clock() - began) / calls

    calls, times = {}, {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants if number % 2 == 0 else reversed(variants):
            tell(variant.name)
            with variant.setting():
                if number == 0:
                    variant.call()  # the first of all also allocates, and may try several kernels
                    once = max(seconds(variant, 1), LEAST_SECONDS / MOST_CALLS)
                    calls[variant.name] = math.ceil(LEAST_SECONDS / once)
                else:
                    times[variant.name].append(seconds(variant, calls[variant.name]))
    return times


def peak_memory(call: Callable[[], Any], device: torch.device) -> Optional[int]:
    """The most bytes that a call holds at any time, beyond what was held before; None where nobody counts them.

    Of PyTorch's allocator, so without what libraries such as oneDNN allocate for themselves.
    """
    gc.collect()  # not in the middle of the call
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        return max(itertools.accumulate(_cpu_allocations(call), initial=0))
    return None


def _cpu_allocations(call: Callable[[], Any]) -> list[int]:
    """The bytes of every allocation (positive) and release (negative) on the CPU during a call, in their order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler is talkative otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
    # No public interface tells them one by one.
    events = trace.profiler.kineto_results.events()
    of_memory = [event for event in events if event.name() == "[memory]" and "CPU" in str(event.device_type())]
    return [event.nbytes() for event in sorted(of_memory, key=lambda event: event.start_ns())]


def summarize(times: dict[str, list[float]], memory: dict[str, Optional[int]]) -> list[dict[str, Any]]:
    """A row for each variant: the median, and the median and the range of its ratio to the first in the same round."""
    baseline = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds, baseline)]
        rows.append(
            {
                "name": name,
                "median_ms": 1000 * statistics.median(seconds),
                "ratio": _spread(ratios),
                "peak_bytes": memory.get(name),
                "ms": [1000 * one for one in seconds],
            }
        )
    return rows


def speedup(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast the gated network's fastest deployed form is as the dense twin's fastest; {} without."""
    forms = [
        min((row for row in rows if row["name"].split()[0] == kind), key=lambda row: row["median_ms"], default=None)
        for kind in (BASELINE, "deployed")
    ]
    if None in forms:
        return {}
    dense, ours = forms
    ratios = [one / other for one, other in zip(dense["ms"], ours["ms"])]
    return {"speedup": {"of": ours["name"], "over": dense["name"], **_spread(ratios)}}


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


# Reporting ------------------------------------------------------------------------------------------------


def benchmark(
    recipe: Recipe,
    plan: Sequence[Measurement],
    folder: Path,
    rounds: int,
    console: Console,
    sources: Sequence[Source] = (),
) -> dict[str, Any]:
    """Measure what `plan_benchmark` and `plan_data` have planned; `benchmark.json` and `benchmark.png` into a folder.

    Returns:
        What is in the JSON file, which grows with every measurement: the machine, the recipe, all times.
    """
    device = select_device(recipe.device)
    wait = _waiter(device)
    report = {
        "name": recipe.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(device),
        "rounds": rounds,
        "input": input_size(recipe.data),
        "recipe": recipe.model_dump(),
        "measurements": [],
    }
    total = sum(len(variants) * (rounds + 1 + with_memory) for _, _, variants, with_memory in plan)
    total += len(sources) * (rounds + 1)
    try:
        with measuring_bar(console, total) as show:
            for what, batch, variants, with_memory in plan:
                tell = partial(show, f"{what}, batch {batch}")
                times = measure_times(variants, rounds, wait, tell)
                memory = {}
                for variant in variants if with_memory else ():
                    tell(f"{variant.name}, memory")
                    with variant.setting():
                        memory[variant.name] = peak_memory(variant.call, device)
                rows = summarize(times, memory)
                report["measurements"].append({"what": what, "batch": batch, "variants": rows} | speedup(rows))
                write_atomically(folder / "benchmark.json", json.dumps(report, indent=2) + "\n")
            if sources:
                rows, workers = measure_rates(sources, rounds, partial(show, "images a second")), _workers(recipe.data)
                report["data"] = {"workers": workers, "batch": recipe.data.batch_size, "sources": rows}
                report["data"] |= verdict(rows, _step_name(HALF_WAY), workers)
                write_atomically(folder / "benchmark.json", json.dumps(report, indent=2) + "\n")
    finally:
        with suppress(OSError):
            folder.rmdir()  # only a folder in which nothing is: interrupted in the first measurement
    write_atomically(folder / "benchmark.png", draw_benchmark(report))
    return report


def _workers(data: Data) -> int:
    return data.workers if data.name in FILES else 0  # a small set lies on the device


def benchmark_folder(recipe: Recipe, out: Optional[Path] = None) -> Path:
    """Make the folder of a benchmark: `out`, or one below the recipe's `output` named for the recipe and the time.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    folder = out or recipe.runs / f"benchmark-{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    key = "--out" if out else "output"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot make the folder {folder}: {error.strerror}; name another one") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} is not writable; name a folder of yours")
    return folder


def machine(device: torch.device) -> dict[str, Any]:
    """What times depend on, beside the recipe."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "timm": timm.__version__,
        "fastai": fastai.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system, or a processor without a name
        return platform.processor() or platform.machine()
