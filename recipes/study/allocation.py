"""How much to cut in which layer: one gate factor for all layers against one for each, at equal MACs.

A narrow ResNet-18 of timm learns to read characters at a low resolution (the task of `gates.py`) as a dense network. It
is then converted, so that closed it costs a share of the dense network's MACs, and trained further while its gates
close. The ways to choose the gate factors differ in nothing else: seeds, steps and learning rate are the same.

    python recipes/study/render_glyphs.py pictures/kanji --classes 100 --copies 3 --seed 1
    python recipes/study/allocation.py pictures/kanji allocation.csv

The rows that are in the table already are not repeated, so that a command that was stopped can be given again.
"""

import argparse
import csv
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor

from dgc_fastai import budget, convert, gate_penalty, set_progress
from dgc_fastai.models.allocation import allocate, mac_budget, mac_options, one_gate_factor
from dgc_fastai.models.sensitivity import losses_by_channels, scan_layers
from dgc_fastai.utils.files import write_table

spec = importlib.util.spec_from_file_location("gates", Path(__file__).with_name("gates.py"))
assert spec and spec.loader
gates: Any = importlib.util.module_from_spec(spec)
sys.modules["gates"] = gates  # dataclasses look it up
spec.loader.exec_module(gates)

INPUT = 1, gates.SIZE, gates.SIZE
IMAGES = 256  # training images of the scan
Data = dict[str, tuple[Tensor, Tensor]]
GateFactor = float | dict[str, float]


def network(classes: int) -> nn.Module:
    """Four stages of two blocks on maps of 12, 6, 3 and 2 pixels; 7.4 million MACs."""
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes, in_chans=1, channels=(16, 32, 64, 128))
    model.maxpool = nn.Identity()
    return model


def one_factor(dense: nn.Module, target: float, images: Tensor) -> GateFactor:
    options, cost = _options(dense)
    return one_gate_factor(options, mac_budget(options, cost, target))


def chosen(dense: nn.Module, target: float, images: Tensor, power: int = 1) -> GateFactor:
    """What `model.convert.target` chooses, by the square root of the divergence."""
    options, cost = _options(dense)
    found = scan_layers(dense, [one.name for one in options], images, heads=4)
    losses = {name: [divergence**power for divergence in row] for name, row in found.items()}
    options = [replace(one, losses=losses_by_channels(losses[one.name], one.channels)) for one in options]
    kept = allocate(options, mac_budget(options, cost, target))
    return {one.name: one.gate_factor(kept[one.name]) for one in options}


METHODS: dict[str, Callable[[nn.Module, float, Tensor], GateFactor]] = {
    "one": one_factor,
    "chosen": chosen,
    "divergence": lambda *arguments: chosen(*arguments, power=2),  # its square root is the divergence itself
}


def _options(dense: nn.Module):
    converted = convert(deepcopy(dense).to("meta"), input_size=INPUT)
    cost = budget(converted, INPUT)
    return mac_options(converted, cost), cost


def train(model: nn.Module, data: Data, epochs: int, lr: float, seed: int) -> nn.Module:
    pictures, labels = data["train"]
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(gates.parameter_groups(model, gates.Variant(""), lr), lr=lr, betas=(0.9, 0.99))
    by_epoch = len(pictures) // gates.BATCH
    for step in range(epochs * by_epoch):
        if step % by_epoch == 0:
            parts = torch.randperm(len(pictures), generator=generator).split(gates.BATCH)
        index = parts[step % by_epoch]
        progress = step / (epochs * by_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * gates.one_cycle(progress)
        set_progress(model, progress)
        model.train()
        x = gates.augment(gates.degrade(pictures[index], generator), generator)
        loss = F.cross_entropy(model(x), labels[index])
        (loss + 1e-5 * gate_penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def dense_network(folder: Path, data: Data, classes: int, seed: int, epochs: int) -> nn.Module:
    file = folder / f"dense-{seed}.pt"
    torch.manual_seed(seed)
    model = network(classes)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    train(model, data, epochs, 4e-3, seed)
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--methods", nargs="+", default=["one", "chosen"], choices=METHODS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dense-epochs", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=6, help="of the training after the conversion")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = gates.read(options.pictures)
    classes = len(set(data["train"][1].tolist()))
    rows = list(csv.DictReader(options.table.open())) if options.table.exists() else []
    done = {(row["method"], row["target"], row["seed"]) for row in rows}
    for seed in options.seeds:
        dense = dense_network(options.table.with_suffix(".weights"), data, classes, seed, options.dense_epochs)
        runs = [("dense", 1.0), *((method, target) for target in options.targets for method in options.methods)]
        for method, target in runs:
            if (method, f"{target}", f"{seed}") in done:
                continue
            began, factors, model = time.monotonic(), None, deepcopy(dense)
            if method != "dense":
                images = gates.degrade(data["train"][0][:: len(data["train"][0]) // IMAGES][:IMAGES], torch.Generator())
                factors = METHODS[method](dense, target, images)
                torch.manual_seed(seed)
                convert(model, gate_factor=factors, input_size=INPUT)
                train(model, data, options.epochs, 1e-3, seed)
            cost = budget(model, INPUT)
            row = {
                "method": method,
                "target": target,
                "seed": seed,
                "macs": cost.macs,
                "share": round(cost.macs / cost.macs_dense, 4),
                "val": round(gates.accuracy(model, data["val"]), 2),
                "test": round(gates.accuracy(model, data["test"]), 2),
                "seconds": round(time.monotonic() - began, 1),
                "gate_factors": json.dumps(factors),
            }
            rows.append(row)
            write_table(options.table, rows)
            print({key: value for key, value in row.items() if key != "gate_factors"}, flush=True)


if __name__ == "__main__":
    main()
