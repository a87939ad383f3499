"""Run folders that no training has written."""

import json
import math

from dgc_fastai import load_recipe
from dgc_fastai.layers.gate_schedule import set_progress
from dgc_fastai.models.checkpoints import save_checkpoint
from dgc_fastai.models.factory import build_model, network_cost
from dgc_fastai.utils.files import write_table
from helpers.runs import SMALL

DIGITS = list("0123456789")


def store_run(folder, *overrides, recipe="quickstart", classes=DIGITS, weights=True, top_1=0.9, epochs=None, **summary):
    """A folder as a run of `recipe` with a small network leaves it: history and accuracy are made up.

    Args:
        classes: of its data.
        epochs: that are finished; by default all.
        summary: further entries of `summary.json`.
    """
    folder.mkdir(parents=True)
    plan = load_recipe(recipe, [*SMALL, *overrides])
    (folder / "recipe.yaml").write_text(plan.to_yaml())
    of, cost = plan.train.epochs, network_cost(plan.model, len(classes), plan.data.input_size)
    rows = [_row(epoch, of, top_1) for epoch in range(1, (epochs or of) + 1)]
    write_table(folder / "history.csv", rows)
    costs = {name: getattr(cost, name) for name in ("macs", "macs_dense", "operations", "parameters")}
    facts = {
        "epochs": len(rows),
        "seconds": 60.0,
        "best": rows[-1],
        "last": rows[-1],
        "problems": [],
        **costs,
        **summary,
    }
    (folder / "summary.json").write_text(json.dumps(facts))
    if weights:
        network = build_model(plan.model, len(classes), plan.data.input_size)
        set_progress(network, 1.0)
        metadata = {"recipe": plan.to_yaml(), "classes": json.dumps(classes), "format": "pt"}
        save_checkpoint(network, folder / "best.safetensors", metadata)
    return folder


def _row(epoch, of, top_1):
    done = epoch / of
    return {
        "epoch": epoch,
        "train_loss": 2.3 * math.exp(-3 * done),
        "valid_loss": 2.2 * math.exp(-2.5 * done),
        "top_1": top_1 * (1 - math.exp(-5 * done)) / (1 - math.exp(-5)),
        "top_5": 1 - 0.1 * math.exp(-5 * done),
        "inactive": 0.75 * min(1.0, max(0.0, (done - 1 / 12) * 1.5)),
        "gate_penalty": 40.0,
        "lr": 0.01 * (1 - done),
        "seconds": 2.5,
    }
