"""A recipe's network on the clock: its training step, peak memory and inference beside those of its twins without
gates and of the authors' formulation, on this machine."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn as nn
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from rich.console import Console
from torch import Tensor

from ..data.loaders import FILES, class_names, input_size
from ..inference.deploy import deploy
from ..layers.gate_schedule import dgc_layers, gate_penalty, set_progress
from ..models.factory import build_model, prepare
from ..ops.device import select_device, use_device
from ..ops.gated_conv2d import use_formulation
from ..recipe.schema import Data, Recipe
from ..training.learner import assemble
from ..utils.errors import RecipeError, UserError
from ..utils.files import write_atomically
from .benchmark_report import draw_benchmark, measuring_bar
from .throughput import Source, measure_rates, pipeline_sources, repeat, verdict
from .timing import Measurement, Variant, _spread, machine, measure_times, peak_memory, summarize

__all__ = ["benchmark", "benchmark_folder", "plan_benchmark", "plan_data"]

BASELINE, AGAIN = "dense", "dense again"  # the same network, first and last of a round
HALF_WAY = "ours at 0.5"


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
        layer.penalty = None  # or the next step would free what this one has allocated


def training_step(recipe: Recipe, network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of the recipe's training, without what may surround it: averages, accumulation, clipping, mixing.

    The learning rate is zero, so that the weights are the same in every round.

    Args:
        images, labels: a batch on the network's device, [B, C, H, W] and [B].
    """
    learn = assemble(recipe, DataLoaders(), network)
    learn.opt.set_hyper("lr", 0.0)
    optimizer, loss_function, lasso = learn.opt.opt, learn.loss_func, recipe.train.lasso_weight
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
