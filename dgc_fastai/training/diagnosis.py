"""What went wrong in a run, in a line each, with what to try. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..recipe.schema import Recipe

__all__ = ["Findings", "problems"]

MIN_EPOCHS = 4  # before a training loss can be said to have stopped falling


@dataclass
class Findings:
    """What a run has seen besides its rows of numbers.

    Attributes:
        images: validation images of each class.
        overflowed: the first layer, in the order of computation, whose output was NaN or Inf in validation.
        closed: DGC layers whose gates were zero for every image and channel at the end of the last epoch.
    """

    images: list[int] = field(default_factory=list)
    overflowed: str | None = None
    closed: list[str] = field(default_factory=list)


def problems(rows: Sequence[dict[str, Any]], findings: Findings, recipe: Recipe, classes: Sequence[str]) -> list[str]:
    """Problems of a run, worst first; none for a run that has learned something.

    Args:
        rows: of the history, one per epoch.
        classes: class names.
    """
    found = [
        _overflow(rows, findings, recipe),
        _closed(findings),
        _no_better_than_guessing(rows, findings, recipe, classes),
        _loss_stopped_falling(rows),
    ]
    return [line for line in found if line]


def _overflow(rows: Sequence[dict], findings: Findings, recipe: Recipe) -> str | None:
    wrong = [row["epoch"] for row in rows if not math.isfinite(row["valid_loss"])]
    if not wrong:
        return None
    first = f"; {findings.overflowed} overflowed first" if findings.overflowed else ""
    where = f"in {len(wrong)} of {len(rows)} epochs, from epoch {wrong[0]} on" if len(rows) > 1 else "in the only epoch"
    return f"The validation loss was NaN or Inf {where}{first}. Try {_steadier(recipe)}."


def _closed(findings: Findings) -> str | None:
    if not findings.closed:
        return None
    names = ", ".join(findings.closed[:3]) + (", ..." if len(findings.closed) > 3 else "")
    layers = "1 layer" if len(findings.closed) == 1 else f"{len(findings.closed)} layers"
    return (
        f"All gates of {layers} are zero, so nothing passes there: {names}. "
        "Try a smaller train.lr, train.weight_decay or train.lasso_weight."
    )


def _no_better_than_guessing(
    rows: Sequence[dict], findings: Findings, recipe: Recipe, classes: Sequence[str]
) -> str | None:
    images = sum(findings.images)
    if not images:
        return None
    largest = max(findings.images)
    guess = max(largest / images, 1 / len(classes))
    reached = max(row["top_1"] for row in rows)
    # Two standard errors of a guess: with few images, chance alone is above its own mean in half of the epochs.
    if guess < 1 and reached >= min(1, guess + 2 * math.sqrt(guess * (1 - guess) / images)):
        return None
    frequent = classes[findings.images.index(largest)]
    tries = "another train.lr or more epochs"
    if recipe.model.convert or recipe.model.has_gates or recipe.model.arch.endswith("_sgc"):
        baseline = "model.convert=null" if recipe.model.convert else f"model.arch={recipe.model.dense.arch}"
        tries += f"; the baseline, {baseline}, tells whether it is the gates or the data"
    return (
        f"Top-1 never exceeded {100 * reached:.1f} %, no better than guessing: always answering {frequent!r} gives "
        f"{100 * largest / images:.1f} % of the {images:,} validation images. Try {tries}."
    )


def _loss_stopped_falling(rows: Sequence[dict]) -> str | None:
    losses = [row["train_loss"] for row in rows]
    if len(losses) < MIN_EPOCHS:
        return None
    lowest = min(range(len(losses)), key=losses.__getitem__)
    if lowest >= len(losses) // 2:
        return None
    return (
        f"The training loss has not fallen since epoch {rows[lowest]['epoch']} of {len(rows)} "
        f"({losses[lowest]:.3g}, at the end {losses[-1]:.3g}). Try a smaller train.lr, or a larger model.gate_factor."
    )


def _steadier(recipe: Recipe) -> str:
    """What makes a network steadier that it does not have yet."""
    model = recipe.model
    if recipe.train.precision == "fp16":
        return "train.precision=bf16 or float32"
    if not model.has_gates:
        return "a smaller train.lr, or train.clip"
    if not model.zero_init_gates:
        return "model.zero_init_gates=true" + (" with model.preact=false" if "resnet" in model.arch else "")
    return "a smaller train.lr, or train the dense network first and convert it"
