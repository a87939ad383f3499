"""What the gates of a network are worth: one small network, one task, many ways to use and to train the gates.

The task is to read characters at a low resolution, with noise and a covered square, in type families that training has
not seen. Its pictures are degraded anew in each epoch, so that the network has too little capacity rather than too few
pictures: dense at full cost beats every network of half its cost. One thread, a fixed order of random numbers: a row
is the same wherever the same version of PyTorch computes it on the same kind of processor.

    python recipes/study/render_glyphs.py pictures/kanji --classes 100 --copies 3 --seed 1
    python recipes/study/gates.py pictures/kanji gates.csv --variants open fixed_selection --seeds 0 1 2
    python recipes/study/gates.py pictures/kanji gates.csv                               # every variant, hours

The runs that are in the table already are not repeated, so that a command that was stopped can be given again.
"""

import argparse
import copy
import csv
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import track
from torch import Tensor

from dgc_fastai import budget, gate_statistics
from dgc_fastai.analysis.gate_controls import replaced_gates
from dgc_fastai.layers.dynamic_group_conv import DynamicGroupConv2d, HeadGates
from dgc_fastai.layers.gate_schedule import dgc_layers, gate_penalty, num_inactive
from dgc_fastai.utils.figures import to_png
from dgc_fastai.utils.files import write_atomically, write_table
from dgc_fastai.utils.means import mean_text, standard_error

SIZE = 24  # pixels of the network's input
BATCH = 128
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Variant:
    """A network and a way to train it. What is not given is as in `open`."""

    about: str
    network: dict[str, Any] = field(default_factory=dict)
    arch: str = "dgc_densenet86"
    gates: dict[str, Any] = field(default_factory=dict)  # of StudiedGates
    gate_lr: float = 1.0  # times the learning rate of the other parameters
    gate_decay: bool = False
    closing: tuple[float, float] = (1 / 12, 3 / 4)
    cubic: bool = False
    lasso: float = 1e-5
    extra: str = ""  # a further loss of the gates
    extra_weight: float = 0.0
    ema: bool = False
    teacher: str = ""  # variant whose trained network of the same seed teaches
    start: str = ""  # variant whose trained network of the same seed is the start
    epochs: float = 1.0  # times the epochs of the study
    lr: float = 1.0  # times the learning rate of the study


SHALLOW = {"stages": [2, 3, 3]}
DENSE: dict[str, Any] = {"arch": "dgc_densenet86_dense"}
PUBLISHED = {"zero_init_gates": False}
VARIANTS = {
    # Rivals without gates.
    "dense": Variant("dense at full cost", **DENSE),
    "shallower": Variant("dense, stages of 2, 3, 3 layers instead of 4, 4, 4", SHALLOW, **DENSE),
    "narrower": Variant("dense, 1x1 convolutions with half the outputs", {"bottleneck": 2}, **DENSE),
    "static_groups": Variant("1x1 convolutions of four groups", arch="dgc_densenet86_sgc"),
    # The method, and what of it is needed.
    "published": Variant("as published", PUBLISHED, gate_decay=True),
    "open": Variant("gates that start at one (zero_init_gates)"),
    "fixed_selection": Variant("open; each head keeps the same channels for all images", gates={"scores": "bias"}),
    "input_free": Variant("open; gates learned, but the same for all images", gates={"input_free": True}),
    "random_selection": Variant("channels drawn at random, never changed", gates={"scores": "random"}),
    "scaled_shallower": Variant("shallower; gates scale and never close", {**SHALLOW, "gate_factor": 1.0}),
    # Two thirds of the cost of dense.
    "shallower_333": Variant("dense, stages of 3, 3, 3 layers", {"stages": [3, 3, 3]}, **DENSE),
    "narrower_3": Variant("dense, 1x1 convolutions with three quarters of the outputs", {"bottleneck": 3}, **DENSE),
    "static_groups_2": Variant("1x1 convolutions of two groups", {"heads": 2}, arch="dgc_densenet86_sgc"),
    "published_half": Variant("published, gate factor 0.5", {**PUBLISHED, "gate_factor": 0.5}, gate_decay=True),
    "open_half": Variant("open, gate factor 0.5", {"gate_factor": 0.5}),
    "input_free_half": Variant("input_free, gate factor 0.5", {"gate_factor": 0.5}, gates={"input_free": True}),
    # Less than half of it.
    "shallower_223": Variant("dense, stages of 2, 2, 3 layers", {"stages": [2, 2, 3]}, **DENSE),
    "narrower_344": Variant("narrower, stages of 3, 4, 4 layers", {"bottleneck": 2, "stages": [3, 4, 4]}, **DENSE),
    "static_groups_8": Variant("1x1 convolutions of eight groups", {"heads": 8}, arch="dgc_densenet86_sgc"),
    "published_eighth": Variant("published, gate factor 0.125", {**PUBLISHED, "gate_factor": 0.125}, gate_decay=True),
    "open_eighth": Variant("open, gate factor 0.125", {"gate_factor": 0.125}),
    "input_free_eighth": Variant("input_free, gate factor 0.125", {"gate_factor": 0.125}, gates={"input_free": True}),
    "open_narrower": Variant("open, 1x1 convolutions with three quarters of the outputs", {"bottleneck": 3}),
    # Twice the epochs.
    "dense_long": Variant("dense, twice the epochs", epochs=2.0, **DENSE),
    "narrower_long": Variant("narrower, twice the epochs", {"bottleneck": 2}, epochs=2.0, **DENSE),
    "static_groups_long": Variant("static groups, twice the epochs", arch="dgc_densenet86_sgc", epochs=2.0),
    "open_long": Variant("open, twice the epochs", epochs=2.0),
    "input_free_long": Variant("input_free, twice the epochs", gates={"input_free": True}, epochs=2.0),
    # Another learning rate.
    **{
        f"{name}_lr_{word}": Variant(f"{name}, {word} the learning rate", network, lr=times, **more)
        for name, network, more in (
            ("dense", {}, DENSE),
            ("narrower", {"bottleneck": 2}, DENSE),
            ("static_groups", {}, {"arch": "dgc_densenet86_sgc"}),
            ("open", {}, {}),
            ("input_free", {}, {"gates": {"input_free": True}}),
        )
        for word, times in (("half", 0.5), ("twice", 2.0))
    },
    # Tried: selection.
    "normalized_hidden": Variant("batch norm of the gates' hidden units", gates={"norm": True}),
    "normalized_input": Variant("pooled features divided by their mean", gates={"divide": True}),
    "contribution": Variant("select by gate x filter norm x own feature", gates={"scores": "contribution"}),
    "magnitude": Variant("select by gate x filter norm", gates={"scores": "magnitude"}),
    "activation": Variant("select by filter norm x own feature", gates={"scores": "activation"}),
    "noise": Variant("noise on what is selected by, until closed", gates={"noise": 0.5}),
    "static_core": Variant("half of the kept channels fixed", gates={"core": 0.5}),
    "blocks_of_8": Variant("eight neighboring channels share a gate", {"granularity": 8}),
    "gate_dropout": Variant("dropout of the gates' hidden units", gates={"dropout": 0.3}),
    "squeeze_4": Variant("squeeze rate 4", {"squeeze_rate": 4}),
    "squeeze_32": Variant("squeeze rate 32", {"squeeze_rate": 32}),
    "entropy_loss": Variant("gates sharp for an image, broad over a batch", extra="entropy", extra_weight=1e-3),
    "similarity_loss": Variant("images that look alike select alike", extra="similarity", extra_weight=0.1),
    "target_loss": Variant("gates follow own contributions", extra="target", extra_weight=1e-3),
    "bounded": Variant("gates between 0 and 2", gates={"bounded": True}),
    # Tried: training.
    "gate_lr_5": Variant("gates learn five times as fast", gate_lr=5.0),
    "gate_lr_02": Variant("gates learn a fifth as fast", gate_lr=0.2),
    "gate_decay": Variant("weight decay of the gates, too", gate_decay=True),
    "no_lasso": Variant("no lasso", lasso=0.0),
    "close_early": Variant("closed after 30 % of training", closing=(0.0, 0.3)),
    "close_late": Variant("open for 30 %, closed after 90 %", closing=(0.3, 0.9)),
    "close_cubic": Variant("closing fast at first", cubic=True),
    "ema": Variant("averaged weights", ema=True),
    "ema_shallower": Variant("shallower, averaged weights", SHALLOW, ema=True, **DENSE),
    "distilled": Variant("taught by dense", teacher="dense"),
    "distilled_shallower": Variant("shallower, taught by dense", SHALLOW, teacher="dense", **DENSE),
    "distilled_narrower": Variant("narrower, taught by dense", {"bottleneck": 2}, teacher="dense", **DENSE),
    "distilled_groups": Variant("static groups, taught by dense", arch="dgc_densenet86_sgc", teacher="dense"),
    "dense_half": Variant("dense, half of the epochs: a start for the next", epochs=0.5, **DENSE),
    "dense_first": Variant("dense for half of the epochs, then closing", start="dense_half", epochs=0.5, lr=0.5),
}


class StudiedGates(HeadGates):
    """The gates of a layer, with parts replaced. What is not selected is zero, so that the layer drops it."""

    def __init__(
        self,
        layer: DynamicGroupConv2d,
        scores: str = "gates",
        input_free: bool = False,
        norm: bool = False,
        divide: bool = False,
        noise: float = 0.0,
        core: float = 0.0,
        dropout: float = 0.0,
        bounded: bool = False,
    ):
        nn.Module.__init__(self)
        own = layer.gates
        self.squeeze, self.excite, self.bias = own.squeeze, own.excite, own.bias
        self.scores, self.input_free, self.divide = scores, input_free, divide
        self.noise, self.core, self.dropout, self.bounded = noise, core, dropout, bounded
        self.norm = nn.BatchNorm1d(self.squeeze.shape[0] * self.squeeze.shape[1]) if norm else None
        self.random = torch.rand(self.bias.shape)
        self.layer = [layer]  # in a list: not a module of this one
        self.opening = 1.0  # 1 while the gates are open, 0 once they are closed

    def forward(self, pooled: Tensor) -> Tensor:
        gates = self.all_gates(pooled)
        if gates.is_meta:  # of which the cost is counted
            return gates
        kept = self.bias.shape[1] - int(self.layer[0].inactive_channels)
        if kept == gates.shape[2]:
            return gates
        scores = self.scores_of(gates.detach(), pooled.detach())
        if self.noise and self.training:
            scores = scores + self.noise * self.opening * scores.std(-1, keepdim=True) * torch.randn_like(scores)
        if self.core:
            fixed = self.bias.detach().topk(round(kept * self.core)).indices
            scores = scores.scatter(2, fixed.expand(len(scores), -1, -1), math.inf)
        mask = torch.zeros_like(gates).scatter(2, scores.topk(kept).indices, 1.0)
        return gates * mask

    def all_gates(self, pooled: Tensor) -> Tensor:
        if self.input_free:
            return self.bias.relu().expand(len(pooled), -1, -1)
        if self.divide:
            pooled = pooled / (pooled.mean(1, keepdim=True) + 1e-6)
        hidden = torch.einsum("bc,hkc->bhk", pooled, self.squeeze)
        if self.norm is not None:
            hidden = self.norm(hidden.flatten(1)).view_as(hidden)
        hidden = F.dropout(hidden.relu(), self.dropout, self.training)
        gates = torch.einsum("bhk,hck->bhc", hidden, self.excite) + self.bias
        return 2 * torch.sigmoid(2 * (gates - 1)) if self.bounded else gates.relu()

    def scores_of(self, gates: Tensor, pooled: Tensor) -> Tensor:
        match self.scores:
            case "bias":
                return self.bias.detach().expand_as(gates)
            case "random":
                return self.random.expand_as(gates)
            case "magnitude":
                return gates * filter_norms(self.layer[0])
            case "activation":
                return pooled.unsqueeze(1) * filter_norms(self.layer[0])
            case "contribution":
                return gates * pooled.unsqueeze(1) * filter_norms(self.layer[0])
        return gates


def filter_norms(layer: DynamicGroupConv2d) -> Tensor:
    """Of each head's filters, by input channel: [heads, C]."""
    return layer.weight.detach().unflatten(0, (-1, layer.heads)).flatten(3).square().sum((0, 3)).sqrt()


def build(variant: Variant, classes: int) -> nn.Module:
    network: dict[str, Any] = {"stages": [4, 4, 4], "stem_stride": 2, **variant.network}
    if variant.arch == "dgc_densenet86":
        network.setdefault("zero_init_gates", True)
    model = timm.create_model(variant.arch, num_classes=classes, in_chans=1, **network)
    if variant.gates:
        for layer in dgc_layers(model):
            layer.gates = StudiedGates(layer, **variant.gates)
    # What each kind of network trains fastest in.
    return model if dgc_layers(model) else model.to(memory_format=torch.channels_last)


def read(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures uint8 [N, H, W] and class numbers [N] of each part."""
    names = sorted(path.name for path in (folder / "train").iterdir())
    parts = {}
    for part in PARTS:
        files = [
            (path, number) for number, name in enumerate(names) for path in sorted((folder / part / name).iterdir())
        ]
        pictures = np.stack([np.asarray(Image.open(path).convert("L")) for path, _ in files])
        parts[part] = torch.from_numpy(pictures), torch.tensor([place for _, place in files])
    return parts


def degrade(pictures: Tensor, generator: torch.Generator, side: int = 18, noise: float = 12 / 255) -> Tensor:
    """Full contrast, then `side` pixels, a covered square and noise: uint8 [B, H, W] -> [B, 1, SIZE, SIZE]."""
    x = pictures.float().unsqueeze(1) / 255
    darkest, brightest = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = F.interpolate((x - darkest) / (brightest - darkest + 0.05), size=(side, side), mode="area")
    covered, place = round(side * 0.28), torch.rand(len(x), 3, generator=generator)
    first = (place[:, :2] * (side - covered + 1)).long().unsqueeze(-1)
    inside = (torch.arange(side) >= first) & (torch.arange(side) < first + covered)
    square = (inside[:, 0].unsqueeze(2) & inside[:, 1].unsqueeze(1)).unsqueeze(1)
    x = torch.where(square, place[:, 2].view(-1, 1, 1, 1), x)
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return x + noise * torch.randn(x.shape, generator=generator)


def augment(x: Tensor, generator: torch.Generator, most: int = 2) -> Tensor:
    """The batch moved by up to two pixels."""
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    return F.pad(x, (most,) * 4)[:, :, down : down + SIZE, right : right + SIZE]


def batches(part: tuple[Tensor, Tensor], size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
    """A part in one order, shuffled, so that an image's neighbor is of another class, degraded in one way."""
    generator = torch.Generator().manual_seed(7)
    for index in torch.randperm(len(part[0]), generator=generator).split(size):
        yield degrade(part[0][index], generator), part[1][index]


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(part))
    return 100 * right / len(part[0])


def extra_loss(variant: Variant, layer: DynamicGroupConv2d, pooled: Tensor, gates: Tensor) -> Tensor:
    if variant.extra == "entropy":
        share = gates / (gates.sum(-1, keepdim=True) + 1e-6)
        mean = share.mean(0)
        own = (share * (share + 1e-9).log()).sum(-1).mean(0)
        return ((mean * (mean + 1e-9).log()).sum(-1) - own).sum()
    if variant.extra == "similarity":
        features = F.normalize(pooled - pooled.mean(0), dim=1)
        selected = F.normalize((gates - gates.mean(0)).flatten(1), dim=1)
        return (features @ features.T - selected @ selected.T).square().mean()
    target = pooled.unsqueeze(1) * filter_norms(layer)
    return (gates - target / (target.mean(-1, keepdim=True) + 1e-6)).square().mean((0, 2)).sum()


def parameter_groups(model: nn.Module, variant: Variant, lr: float, decay: float = 0.05) -> list[dict[str, Any]]:
    gating = {id(one) for layer in dgc_layers(model) for one in layer.gates.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for one in model.parameters():
        gates = id(one) in gating
        decays = variant.gate_decay if gates else one.dim() > 1
        groups.setdefault((gates, decays), []).append(one)
    return [
        {"params": params, "weight_decay": decay * decays, "peak": lr * (variant.gate_lr if gates else 1)}
        for (gates, decays), params in groups.items()
    ]


def one_cycle(progress: float, warm: float = 0.25) -> float:
    if progress < warm:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / warm)) / 2
    return (1 + math.cos(math.pi * (progress - warm) / (1 - warm))) / 2 + 1e-4


def set_gates(model: nn.Module, variant: Variant, progress: float) -> None:
    first, last = variant.closing
    closed = min(1.0, max(0.0, (progress - first) / (last - first)))
    closed = 1 - (1 - closed) ** 3 if variant.cubic else closed
    for layer in dgc_layers(model):
        # The schedule's own rounding, at the progress at which it has closed as far.
        inactive = num_inactive(layer.in_channels, layer.gate_factor, 1 / 12 + closed * 2 / 3, layer.granularity)
        layer.inactive_channels.fill_(inactive)
        if isinstance(layer.gates, StudiedGates):
            layer.gates.opening = 1 - closed


def train(variant: Variant, seed: int, epochs: int, lr: float, data: dict, weights: Path) -> tuple[nn.Module, float]:
    """Returns the network and the mean loss of the last epoch."""
    torch.manual_seed(seed)
    pictures, labels = data["train"]
    classes = int(labels.max()) + 1
    model = build(variant, classes)
    if variant.start:
        load_start(model, torch.load(weights / f"{variant.start}-{seed}.pt", weights_only=True))
    teacher = build(VARIANTS[variant.teacher], classes).eval() if variant.teacher else None
    if teacher is not None:
        teacher.load_state_dict(torch.load(weights / f"{variant.teacher}-{seed}.pt", weights_only=True))
    average = copy.deepcopy(model) if variant.ema else None
    optimizer = torch.optim.AdamW(parameter_groups(model, variant, lr), lr=lr, betas=(0.9, 0.99))
    watched = watch(model) if variant.extra else {}
    generator = torch.Generator().manual_seed(1000 + seed)
    steps, mean = epochs * (len(pictures) // BATCH), 0.0
    for epoch in range(epochs):
        order = torch.randperm(len(pictures), generator=generator)
        losses = []
        for number, index in enumerate(order.split(BATCH)[: len(pictures) // BATCH]):
            progress = (epoch * (len(pictures) // BATCH) + number) / steps
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * one_cycle(progress)
            set_gates(model, variant, progress)
            x, y = augment(degrade(pictures[index], generator), generator), labels[index]
            model.train()
            scores = model(x)
            loss = F.cross_entropy(scores, y)
            losses.append(loss.item())
            if teacher is not None:
                with torch.no_grad():
                    taught = (teacher(x) / 2).log_softmax(1)
                distance = F.kl_div((scores / 2).log_softmax(1), taught, reduction="batchmean", log_target=True)
                loss = 0.3 * loss + 0.7 * 4 * distance
            if dgc_layers(model):
                loss = loss + variant.lasso * gate_penalty(model)
            if variant.extra:
                loss = loss + variant.extra_weight * sum(extra_loss(variant, *one) for one in watched.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            if average is not None:
                update_average(average, model, step=epoch * (len(pictures) // BATCH) + number)
        mean = sum(losses) / len(losses)
    model = model if average is None else average
    set_gates(model, variant, 1.0)
    return model, mean


def watch(model: nn.Module) -> dict[DynamicGroupConv2d, tuple]:
    """Pooled features and gates of each layer's last forward pass."""
    seen: dict[DynamicGroupConv2d, tuple] = {}
    for layer in dgc_layers(model):
        layer.gates.register_forward_hook(
            lambda _, inputs, gates, layer=layer: seen.__setitem__(layer, (layer, inputs[0].detach(), gates))
        )
    return seen


def load_start(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Dense weights, whose 1x1 convolutions are the filters of the DGC layers; the gates are as they were."""
    own = model.state_dict()
    for name in own:
        source = name.replace("conv1.weight", "conv1.conv.weight") if name not in state else name
        if source in state:
            own[name] = state[source]
    model.load_state_dict(own)
    for layer in dgc_layers(model):
        layer.open_gates()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    decay = min(0.998, step / (10 + step))
    for old, new in zip(average.state_dict().values(), model.state_dict().values()):
        old.copy_(old * decay + new * (1 - decay) if old.is_floating_point() else new)


def measure(model: nn.Module, data: dict) -> dict[str, float]:
    """Accuracies in percent, cost, and what the gates do on the validation pictures."""
    found = {"M_MACs": budget(model, (1, SIZE, SIZE)).macs / 1e6}
    found.update({part: accuracy(model, data[part]) for part in PARTS[1:]})
    if dgc_layers(model) and any(int(layer.inactive_channels) for layer in dgc_layers(model)):
        for kind in ("another_image", "mean"):
            with replaced_gates(model, kind):
                found[kind] = accuracy(model, data["val"])
        layers = gate_statistics(model, batches(data["val"])).layers
        for name in ("usage_entropy", "class_information"):
            found[name] = sum(layer.mean(name) for layer in layers) / len(layers)
    return {name: round(value, 3) for name, value in found.items()}


COLUMNS = (
    *("variant", "seed", "epochs", "lr", "M_MACs", "val", "test", "train_loss", "another_image", "mean"),
    *("usage_entropy", "class_information", "cpu_seconds"),
)


def run(folder: Path, weights: Path, name: str, seed: int, epochs: int, lr: float) -> dict[str, Any]:
    """Train and measure one variant: a row of the table."""
    torch.set_num_threads(1)
    variant, data, start = VARIANTS[name], read(folder), time.process_time()
    epochs, lr = round(epochs * variant.epochs), lr * variant.lr
    model, loss = train(variant, seed, epochs, lr, data, weights)
    torch.save(model.state_dict(), weights / f"{name}-{seed}.pt")
    row = {"variant": name, "seed": seed, "epochs": epochs, "lr": lr, **measure(model, data)}
    return row | {"train_loss": round(loss, 4), "cpu_seconds": round(time.process_time() - start)}


def run_all(args: argparse.Namespace) -> None:
    """Every run that the table lacks, those that others start from, or are taught by, first."""
    weights = args.table.parent / f"{args.table.stem}-weights"
    weights.mkdir(parents=True, exist_ok=True)
    done = read_table(args.table)
    known = {(row["variant"], int(row["seed"])) for row in done}
    wanted = [(name, seed) for seed in args.seeds for name in args.variants]
    needed = [(other, seed) for name, seed in wanted for other in needs(name)]
    missing = [one for one in dict.fromkeys(needed + wanted) if one not in known]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for is_second in (False, True):
            runs = [
                pool.submit(run, args.folder, weights, name, seed, args.epochs, args.lr)
                for name, seed in missing
                if bool(needs(name)) == is_second
            ]
            for finished in track(as_completed(runs), "Training", len(runs)):
                done.append(finished.result())
                write_table(args.table, [{column: row.get(column, "") for column in COLUMNS} for row in done])


def needs(name: str) -> list[str]:
    """The variants whose weights a variant needs."""
    return [other for other in (VARIANTS[name].start, VARIANTS[name].teacher) if other]


def read_table(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/study.md: means over seeds, with standard errors."""
    heads = ("", "M MACs", "validation", "test", "another image's gates", "mean gates", "usage entropy")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        if own:
            cells = [_mean(own, column, digits) for column, digits in SHOWN.items()]
            lines.append(f"| `{name}`: {VARIANTS[name].about} | {float(own[0]['M_MACs']):.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


CURVES = {  # of the figure: variants that are alike but for their cost
    "dense, narrower": ("narrower_344", "narrower", "narrower_3", "dense"),
    "dense, shallower": ("shallower_223", "shallower", "shallower_333", "dense"),
    "static groups": ("static_groups_8", "static_groups", "static_groups_2"),
    "DGC as published": ("published_eighth", "published", "published_half"),
    "DGC, gates from one": ("open_eighth", "open", "open_half"),
    "the same, input-free": ("input_free_eighth", "input_free", "input_free_half"),
}


def draw(rows: list[dict[str, Any]]) -> bytes:
    """The figure of docs/study.md: accuracy against cost, means over seeds with standard errors, as a PNG."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, part, title in zip(panels, PARTS[1:], ("validation families", "test families")):
        for number, (label, names) in enumerate(CURVES.items()):
            points = [[row for row in rows if row["variant"] == name] for name in names]
            costs = [float(own[0]["M_MACs"]) for own in points if own]
            values = [[float(row[part]) for row in own] for own in points if own]
            errors = [standard_error(one) or 0.0 for one in values]
            means = list(map(statistics.mean, values))
            style = "-" if number < 3 else "--"
            axes.errorbar(costs, means, errors, label=label, linestyle=style, marker="o", markersize=4, capsize=3)
        axes.set(xlabel="M MACs for one picture", ylabel="top-1 in %", title=title)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return to_png(figure)


SHOWN = {"val": 1, "test": 1, "another_image": 1, "mean": 1, "usage_entropy": 2}


def _mean(rows: list[dict[str, Any]], column: str, digits: int) -> str:
    return mean_text([float(row[column]) for row in rows if row[column] != ""], digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="pictures, with train/, val/ and test/")
    parser.add_argument("table", type=Path, help="CSV file; runs that are in it are not repeated")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.02, help="of AdamW, at its peak")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, each on one thread")
    parser.add_argument("--markdown", action="store_true", help="print the means of the table, and train nothing")
    parser.add_argument("--figure", type=Path, help="draw the table into this PNG file, and train nothing")
    args = parser.parse_args()
    if args.figure:
        write_atomically(args.figure, draw(read_table(args.table)))
    if args.markdown:
        print(markdown(read_table(args.table)))
    if args.figure or args.markdown:
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that this one starts
    run_all(args)


if __name__ == "__main__":
    main()
