"""Deterministic stand-ins for the four published DGC checkpoints.

The published files cannot be downloaded here. `published_checkpoint_shapes.json` lists the exact
names and shapes of their state dicts; this script fills them with reproducible values, in the same
container layout as the published files: {"state_dict", "epoch", "best_prec1"}.

    python make_state.py NAME OUT.pth.tar        # NAME: a key of published_checkpoint_shapes.json
"""

import json
import sys
import zlib
from pathlib import Path

import torch

GATE_FACTOR = {
    "cifar10_dydensenet86_h4": 0.25,
    "cifar100_dydensenet86_h4": 0.25,
    "imagenet_dydensenet_h4": 0.25,
    "imagenet_dyresnet18_h4": 0.45,
}


def make_state(name: str) -> dict[str, torch.Tensor]:
    shapes = json.loads((Path(__file__).parent / "published_checkpoint_shapes.json").read_text())[name]
    state = {}
    for key, shape in shapes.items():
        g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        noise = torch.randn(shape, generator=g)
        if key.endswith("num_batches_tracked"):
            value = torch.tensor(100)
        elif key.endswith("_inactive_channels"):
            channels = shapes[key.replace("_inactive_channels", "norm.weight")][0]
            value = torch.full((1,), float(round(channels * (1 - GATE_FACTOR[name]))))
        elif key.endswith("running_var"):
            value = 1 + noise.abs()
        elif key.endswith("running_mean"):
            value = 0.1 * noise
        elif len(shape) == 4:  # convolution
            value = noise * (1 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif len(shape) == 2:  # linear: small gates keep the random network's activations bounded
            value = 0.3 * noise * (1 / shape[1]) ** 0.5
        elif ".fc2.bias" in key:
            value = 1 + 0.1 * noise
        elif key.endswith("bias"):
            value = 0.1 * noise
        else:  # norm weight
            value = 1 + 0.1 * noise
        state[key] = value
    return state


if __name__ == "__main__":
    torch.save({"state_dict": make_state(sys.argv[1]), "epoch": 119, "best_prec1": 0.0}, sys.argv[2])
