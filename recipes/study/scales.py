"""How strong the features of single images become, layer by layer, while a network learns.

For each way to start a network it trains 200 steps and writes, for every DGC layer and some of the steps: the root
mean square of the layer's input, by image; the mean gate; the share of gates that are zero. In training mode, where
batch norm uses the batch's statistics, and in evaluation mode, on validation images.

    python recipes/study/render_glyphs.py pictures/letters --characters BDEFGPRS
    python recipes/study/scales.py pictures/letters docs/figures/scales      # scales.csv and scales.png; it resumes
"""

import argparse
import csv
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from dgc_fastai import build_learner, load_recipe, set_progress
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.training import run

STEPS = (0, 20, 50, 100, 200)
NETWORKS = {
    "dgc_resnet18": {"channels": (32, 64, 128, 256)},
    "dgc_resnet50": {"channels": (32, 64, 128, 256)},
    "dgc_densenet22": {},
    "dgc_mobilenetv2_100": {},
}
STARTS = {
    "published": {},
    "published, never closing": {"gate_factor": 1.0},
    "zero_init_gates": {"zero_init_gates": True},
    "zero_init_gates, preact=False": {"zero_init_gates": True, "preact": False},
    "preact=False": {"preact": False},
}
FIELDS = ("network", "start", "step", "mode", "layer", "name", "median", "strongest", "mean_gate", "zero_gates", "loss")
RECIPE = """
name: scales
model: {{arch: {arch}}}
data: {{name: folder, path: '{path}', size: 48, batch_size: 32, augment: []}}
train: {{epochs: {epochs}, optimizer: adamw, lr: 0.003, weight_decay: 0.05, schedule: one_cycle, label_smoothing: 0.1}}
device: cpu
"""


class Scales(Callback):
    """Looks at fixed images before some of the steps, and leaves the network as it was."""

    order = 90

    def __init__(self, training, validation):
        self.batches = {"training": training, "evaluation": validation}
        self.rows = []

    def before_fit(self):
        self.look(0)

    def after_batch(self):
        if self.training and self.train_iter in STEPS:
            self.look(self.train_iter)

    def look(self, step):
        saved = {name: value.clone() for name, value in self.model.state_dict().items()}
        was_training = self.model.training
        for mode, images in self.batches.items():
            self.model.train(mode == "training")
            self.rows += [{"step": step, "mode": mode, **row} for row in measure(self.model, images)]
        self.model.load_state_dict(saved)
        self.model.train(was_training)


def measure(model, images):
    """A row for each DGC layer."""
    rows, names = [], {layer: name for name, layer in model.named_modules()}

    def note_input(layer, inputs):
        strength = inputs[0].float().square().mean((1, 2, 3)).sqrt()
        rows.append({"layer": len(rows), "name": names[layer], "median": float(strength.median())})
        rows[-1]["strongest"] = float(strength.max())

    def note_gates(_, __, gates):
        rows[-1].update(mean_gate=float(gates.mean()), zero_gates=float((gates == 0).float().mean()))

    layers = dgc_layers(model)
    hooks = [layer.register_forward_pre_hook(note_input) for layer in layers]
    hooks += [layer.gates.register_forward_hook(note_gates) for layer in layers]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return rows


def train(folder, arch, keywords):
    """The rows of one network with one start."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        pictures = sum(1 for _ in (folder / "train").rglob("*.png"))
        file.write(RECIPE.format(arch=arch, path=folder, epochs=-(-STEPS[-1] // (pictures // 32))))
        file.flush()
        recipe = load_recipe(file.name)

    def create(model, classes, size):
        return timm.create_model(model.arch, num_classes=classes, in_chans=size[0], **NETWORKS[arch], **keywords)

    with mock.patch.object(run, "create_unconverted", create):
        learn = build_learner(recipe)
    first = learn.dls.train.one_batch()[0]
    valid = torch.cat([batch[0] for batch in learn.dls.valid])[:100]
    set_progress(learn.model, 0)
    scales = Scales(first, valid)
    with learn.removed_cbs(learn._grab_cbs(ProgressCallback)), learn.no_logging(), learn.added_cbs([scales]):
        learn.fit_recipe()
    loss = learn.recorder.values[-1][1]
    return [{**row, "loss": loss} for row in scales.rows]


def draw(rows):
    """A row of axes for each network: how unequal images are in training, how strong they are in evaluation."""
    networks = [name for name in NETWORKS if any(row["network"] == name for row in rows)]
    figure = Figure(figsize=(12, 3 * len(networks) + 0.6), layout="constrained")
    grid = figure.subplots(len(networks), 3, squeeze=False)
    for axes, network in zip(grid, networks):
        for color, start in enumerate(STARTS):
            for ax, mode, step, value in (
                (axes[0], "training", 0, lambda row: float(row["strongest"]) / float(row["median"])),
                (axes[1], "evaluation", 50, lambda row: float(row["strongest"])),
                (axes[2], "evaluation", 200, lambda row: float(row["mean_gate"])),
            ):
                chosen = [
                    row
                    for row in rows
                    if (row["network"], row["start"], row["mode"], int(row["step"])) == (network, start, mode, step)
                ]
                if chosen:
                    values = np.nan_to_num([value(row) for row in chosen], nan=1e30, posinf=1e30)
                    ax.plot(range(1, 1 + len(values)), values, color=f"C{color}", label=start, marker=".", lw=1)
        for ax, title in zip(
            axes,
            (
                "training, step 0: strongest / median image",
                "evaluation, step 50: strongest image",
                "mean gate, step 200",
            ),
        ):
            ax.set_yscale("log")
            ax.set_title(f"{network}\n{title}", fontsize="small")
            ax.grid(alpha=0.3)
            low, high = np.clip(ax.get_ylim(), 1e-3, 1e8)
            ax.set_ylim(low, high)
            ax.yaxis.set_minor_formatter(NullFormatter() if high > 10 * low else ScalarFormatter())
    for ax in grid[-1]:
        ax.set_xlabel("DGC layer")
    handles = {label: handle for ax in grid.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path, help="without ending")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = parser.parse_args()
    table = args.out.with_suffix(".csv")
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    for network in args.networks:
        for start, keywords in STARTS.items():
            if "preact" in keywords and "resnet" not in network:
                continue  # the other families have no additional normalization layers
            if any((row["network"], row["start"]) == (network, start) for row in rows):
                continue
            print(network, start, flush=True)
            rows += [{"network": network, "start": start, **row} for row in train(args.pictures, network, keywords)]
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
    draw(rows).savefig(args.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
