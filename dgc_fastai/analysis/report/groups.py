"""What several runs have in common: labels, groups over seeds, the Pareto front. Imports no torch."""

import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

from ...recipe.loading import differences, value_at
from ...utils.means import standard_error
from .collect import StoredRun

__all__ = ["common_differences", "group_runs", "label_runs", "pareto_front"]

# Where or how a run was written and computed, which does not make it another experiment.
IGNORED = "name", "output", "log", "device"
SEED = "train.seed"
MAX_LABEL = 48


def common_differences(runs: Sequence[StoredRun]) -> list[str]:
    """The recipe keys, without the seed, in which some of the runs differ; not in what was chosen for one target."""
    recipes = [run.recipe.without_choice() for run in runs if run.recipe]
    keys = {key for recipe in recipes for key in differences(recipes[0], recipe, ignore=IGNORED)}
    return sorted(keys - {SEED})


def label_runs(runs: Sequence[StoredRun], keys: Sequence[str]) -> list[str]:
    """A label for each run, the same for runs that differ in their seed only: the values of what differs.

    Labels that would be too long are the recipes' names.
    """
    labels: list[str] = []
    known: dict[tuple, str] = {}
    for run in runs:
        values = tuple(recipe_value(run, key) for key in keys)
        if run.recipe is None:
            labels.append(run.folder.name)
        elif values in known:
            labels.append(known[values])
        else:
            parts = [f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values) if value != "-"]
            # A sweep numbers its recipes' names and adds what was swept.
            name = re.sub(r"^\d{4}-|-seed-\d+$", "", run.recipe.name)
            label = " ".join(parts) or name
            if len(label) > MAX_LABEL:
                label = name
            if label in known.values():
                label = run.folder.name
            known[values] = label
            labels.append(label)
    return labels


def recipe_value(run: StoredRun, key: str) -> str:
    """The value of a recipe's key as text; "-" if there is none."""
    value = run.recipe and value_at(run.recipe.without_choice(), key)
    return "-" if value is None else json.dumps(value, ensure_ascii=False).strip('"')


def group_runs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of runs with one label as one: mean and standard error of the accuracy over seeds, cost, latency.

    Args:
        rows: with "label", "id", "state", "top_1", "macs" and "ms", the last three None if unknown. The accuracy of a
            run that has not finished does not count: its gates are still open.
    """
    labels = dict.fromkeys(row["label"] for row in rows)
    groups = []
    for label in labels:
        own = [row for row in rows if row["label"] == label]
        found = [row["top_1"] for row in own if row["top_1"] is not None and row["state"] == "finished"]
        groups.append(
            {
                "label": label,
                "runs": [row["id"] for row in own],
                "seeds": len(found),
                "top_1": statistics.fmean(found) if found else None,
                "error": standard_error(found),
                "macs": next((row["macs"] for row in own if row["macs"] is not None), None),
                "ms": next((row["ms"] for row in own if row["ms"] is not None), None),
            }
        )
    return groups


def pareto_front(groups: Sequence[dict[str, Any]], cost: str) -> list[str]:
    """The labels of the groups that no other beats: none is as accurate at a lower cost, or better at the same cost."""
    known = [group for group in groups if group["top_1"] is not None and group[cost] is not None]
    front: list[str] = []
    best = float("-inf")
    for group in sorted(known, key=lambda group: (group[cost], -group["top_1"])):
        if group["top_1"] > best:
            front.append(group["label"])
            best = group["top_1"]
    return front
