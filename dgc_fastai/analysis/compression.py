"""What a compression was worth: accuracy, cost and speed of a network before and after."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..inference.deploy import deploy
from ..inference.predict import Predictor
from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..models.cost import budget
from ..ops.device import device_wait, select_channels_last, select_device
from ..recipe.schema import Recipe
from ..training.compression import dense_network, dense_recipe
from ..training.run import TrainingRun
from ..training.run_summary import read_run
from ..utils.files import write_atomically
from .benchmark_report import progress_bar
from .compression_text import runtime_title
from .environment import instruction_sets
from .runtimes import runtime_calls
from .timing import Variant, describe_machine, measure_times, spread

__all__ = ["measure_compression", "measure_cost", "measure_speed"]

ROUNDS = 7
MAX_BATCH = 32
BF16 = {"AVX-512 bf16", "AMX bf16", "NEON bf16"}  # instructions that multiply in it

Row = dict[str, Any]
Form = tuple[Row, Callable[[], Any]]  # without its times, and the function to time


def measure_compression(recipe: Recipe, before: Path | None, folder: Path, console: Console) -> dict[str, Any]:
    """Evaluate and time a network before and after its compression, and keep that in the `summary.json` of the run.

    Args:
        recipe: whose `model.weights` are the dense network, with its classifier.
        before: the run folder of the dense network if it was trained here, too.
        folder: of the run that compressed it.
        console: where to show the progress.

    Returns:
        What `compression_text` tells: `before` and `after`, with accuracy and cost; `speed`, see `measure_speed`.
    """
    dense, compressed = dense_network(recipe), Predictor.from_weights(folder)
    size = compressed.recipe.data.input_size
    top_1 = TrainingRun(dense_recipe(recipe), network=deepcopy(dense)).evaluate(console)["top_1"]
    _, summary = read_run(folder)
    weights = recipe.model.weights
    found = {
        "before": {"arch": recipe.model.arch, "weights": weights, "epochs": _epochs(before), "top_1": top_1}
        | measure_cost(dense, size),
        "after": {"epochs": summary["epochs"], "top_1": summary["best"]["top_1"]}
        | measure_cost(compressed.model, size),
        "input": size,
        "teacher": recipe.train.teacher,
        "speed": measure_speed(
            dense, compressed.model, size, recipe.data.batch_size, select_device(recipe.device), console
        ),
    }
    write_atomically(folder / "summary.json", json.dumps(summary | {"compression": found}, indent=2) + "\n")
    return found


def _epochs(folder: Path | None) -> int:
    return read_run(folder)[1]["epochs"] if folder else 0


def measure_cost(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """MACs with the channels kept now, parameters, bytes of the weights, and the gated layers' share of dense MACs."""
    cost = budget(network, input_size)
    gated = sum(layer.macs_dense for layer in cost.layers if layer.kind == DynamicGroupConv2d.__name__)
    return {
        "macs": cost.macs_now,
        "parameters": cost.parameters,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()),
        "gated_share": gated / cost.macs_dense,
    }


def measure_speed(
    before: nn.Module,
    after: nn.Module,
    input_size: tuple[int, int, int],
    batch: int,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """Milliseconds of the dense network and of the compressed one, for one image and for a batch.

    The dense one is timed as PyTorch computes it, deployed, and in the other runtimes that are installed; the
    compressed one deployed; in float32 and, where the processor multiplies in it, in bf16. All are timed in turn.

    Args:
        batch: images of the larger batch; 32 at most.
        device: where both compute.
        console: where to show the progress.

    Returns:
        `rows`, each with network, runtime, precision, batch and the median, min and max of the milliseconds; `machine`;
        and `left_out`, sentences about runtimes that were not timed.
    """
    batches = [torch.randn(count, *input_size) for count in sorted({1, min(batch, MAX_BATCH)})]
    precisions = ["float32", *(["bf16"] if _multiplies_bf16(device) else [])]
    forms, left_out = _forms(before.to(device).eval(), after.to(device).eval(), batches, precisions, device)
    rows: list[Row] = []
    with progress_bar(console, len(forms) * (ROUNDS + 1)) as show:
        for images in batches:
            own = {runtime_title(row): (row, call) for row, call in forms if row["batch"] == len(images)}
            variants = [Variant(name, nullcontext, call) for name, (_, call) in own.items()]
            notify = partial(show, f"Timing, batch {len(images)}")
            for name, seconds in measure_times(variants, ROUNDS, device_wait(device), notify).items():
                rows.append(own[name][0] | spread([1000 * one for one in seconds]))
    return {"rows": rows, "machine": describe_machine(device), "left_out": left_out}


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        return not BF16.isdisjoint(instruction_sets())
    except OSError:  # not Linux
        return False


def _forms(
    before: nn.Module, after: nn.Module, batches: Sequence[Tensor], precisions: Sequence[str], device: torch.device
) -> tuple[list[Form], list[str]]:
    """What is timed, and what cannot be."""
    networks = {
        # Deployed networks bring the format that suits them.
        ("before", "PyTorch"): deepcopy(before).to(memory_format=torch.channels_last),
        ("before", "deployed"): deploy(before),
        ("after", "deployed"): deploy(after),
    }
    memory_format = torch.channels_last if select_channels_last(None, device) else torch.contiguous_format
    placed = [images.to(device, memory_format=memory_format) for images in batches]
    forms: list[Form] = [
        (_row(network, runtime, precision, len(images)), partial(_infer, module, images, precision))
        for (network, runtime), module in networks.items()
        for precision in precisions
        for images in placed
    ]
    others, left_out = runtime_calls(before, batches, precisions) if device.type == "cpu" else ([], [])
    forms += [(_row("before", one.runtime, one.precision, one.batch), one.call) for one in others]
    return sorted(forms, key=lambda form: form[0]["network"], reverse=True), left_out


def _row(network: str, runtime: str, precision: str, batch: int) -> Row:
    return {"network": network, "runtime": runtime, "precision": precision, "batch": batch}


@torch.inference_mode()
def _infer(network: nn.Module, images: Tensor, precision: str) -> None:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        network(images)
