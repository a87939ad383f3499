"""Measured latency of deployed networks, beside their dense baselines."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ...inference.deploy import deploy
from ...ops.device import device_wait, select_channels_last, select_device
from ..timing import Variant, describe_machine, measure_times, spread

__all__ = ["describe_here", "measure_latency"]

MANY = 8  # networks, from which on each is timed for less long
TIMING, TIMING_MANY = (7, 0.1), (5, 0.02)  # rounds, and seconds of a network in each
MAX_BATCH = 64


def describe_here() -> dict[str, Any]:
    """The machine that this process measures on."""
    return describe_machine(select_device("auto"))


def measure_latency(
    networks: Mapping[str, nn.Module],
    input_sizes: Mapping[str, tuple[int, int, int]],
    batches: Sequence[int] = (1,),
    deadline: float | None = None,
    notify: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[int, dict[str, float]]]:
    """Milliseconds of a call of each network, deployed, on the device that `auto` selects here, by name and batch size.

    All are timed in turn, so that a machine that becomes slower does so for all.

    Args:
        networks: by name; they are moved to the device.
        input_sizes: by the same names, channels, height and width.
        batches: numbers of images, in ascending order.
        deadline: of `time.monotonic`; batches that would take more than half of what is left are left out.
        notify: called with the name of the next network, while no timer runs.

    Returns:
        Median, minimum and maximum over the rounds, by name and by number of images in a batch.
    """
    device = select_device("auto")
    forms = {name: deploy(network.to(device)) for name, network in networks.items()}
    memory_format = torch.channels_last if select_channels_last(None, device) else torch.contiguous_format
    rounds, block = TIMING if len(networks) < MANY else TIMING_MANY
    result: dict[str, dict[int, dict[str, float]]] = {name: {} for name in networks}
    one_image = 0.0  # milliseconds of all networks
    for batch in batches:
        expected = batch * one_image / 1000 * (rounds + 3)
        if deadline is not None and expected > (deadline - time.monotonic()) / 2:
            break
        variants = []
        for name, form in forms.items():
            images = torch.randn(batch, *input_sizes[name], generator=torch.Generator().manual_seed(0))
            images = images.to(device, memory_format=memory_format)
            variants.append(Variant(name, nullcontext, partial(_call, form, images)))
        times = measure_times(variants, rounds, device_wait(device), notify, block=block)
        for name, seconds in times.items():
            result[name][batch] = spread([1000 * one for one in seconds])
        one_image = sum(found[batch]["median"] / batch for found in result.values())
    return result


@torch.inference_mode()
def _call(network: nn.Module, images: torch.Tensor) -> None:
    network(images)
