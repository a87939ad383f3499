"""Where and with what a run was trained."""

from typing import Any

import torch

from ..utils import launch
from ..utils.provenance import describe_process

__all__ = ["run_environment"]


def run_environment(device: torch.device) -> dict[str, Any]:
    """What `summary.json` keeps for whoever wants to repeat a run: `describe_process`, and the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        **describe_process(),
        "device": str(device),
        "gpu": name,
        "processes": launch.world_size(),
        "threads": torch.get_num_threads(),
    }
