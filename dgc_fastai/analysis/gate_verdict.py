"""What the numbers of `dgc gates` say, in three lines. Imports no torch."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

__all__ = ["layer_kind", "verdict"]

FIXED = 0.2
"""Usage entropy up to which a layer is said to keep the same channels for all images. It is that of heads that keep a
quarter of the channels, of which 95 % are always the same."""
BY_CLASS = 0.1
"""Share of the selection's entropy from which on a layer is said to select by class."""
LITTLE = 0.01
"""Accuracy that own gates are worth, over the batch's mean gates, up to which this is said to be little."""


def verdict(gates: dict[str, Any]) -> list[str]:
    """Three sentences: what layers select by; what heads have in common, and what is unused; whether it matters.

    Args:
        gates: what `GateStatistics.to_dict` returns, and "controls", what `gate_controls` returns, or None.
    """
    return [_selection(gates["layers"]), _use(gates["layers"]), _matters(gates.get("controls"))]


def layer_kind(layer: dict[str, Any]) -> str:
    """What a layer selects by: "class"; "image", if not by class; "fixed", by nothing; "open" if it drops nothing,
    "closed" if it keeps nothing."""
    if not layer["inactive"]:
        return "open"
    if layer["fixed_share"] is None:
        return "closed"
    if layer["usage_entropy"] <= FIXED:
        return "fixed"
    return "class" if (layer["class_share"] or 0) >= BY_CLASS else "image"


def _selection(layers: Sequence[dict[str, Any]]) -> str:
    kinds = [layer_kind(layer) for layer in layers]
    found = []
    for kind in ("class", "image", "fixed", "open", "closed"):
        numbers = [number for number, one in enumerate(kinds, 1) if one == kind]
        if numbers:
            chosen = [layers[number - 1] for number in numbers]
            found.append(f"{_named(numbers)} {_does(kind, chosen)}")
    text = "; ".join(found)
    return text[0].upper() + text[1:] + "."


def _does(kind: str, layers: Sequence[dict[str, Any]]) -> str:
    end = "s" if len(layers) == 1 else ""
    if kind == "class":
        return f"select{end} by class (it explains {_percent(layers, 'class_share')} of the selection)"
    if kind == "image":
        return f"select{end} by image" + ("" if layers[0]["class_share"] is None else ", whatever its class")
    if kind == "fixed":
        return f"select{end} the same channels for {_percent(layers, 'fixed_share')} of the images"
    return f"keep{end} nothing" if kind == "closed" else f"drop{end} no channels"


def _use(layers: Sequence[dict[str, Any]]) -> str:
    several = [layer for layer in layers if layer["overlap_heads"] is not None and layer["inactive"]]
    text = ""
    if several:
        shared, chance = _percent(several, "overlap_heads"), _percent(several, "kept_share")
        text = f"two heads have {shared} of their channels in common (by chance: {chance}); "
    total = sum(layer["heads"] * layer["channels"] for layer in layers)
    never, always = (sum(map(sum, ([*one["by_head"][key]] for one in layers))) for key in ("never_kept", "always_kept"))
    text += f"of {total:,} inputs of all heads, {always:,} are kept for every image, {never:,} for none."
    return text[0].upper() + text[1:]


def _matters(controls: dict[str, Any] | None) -> str:
    if controls is None:
        return "Whether the selection matters is not known: that needs class numbers, and two images or more."
    loss, error = -controls["mean"]["difference"], controls["mean"]["standard_error"]
    if loss < max(2 * error, 1e-3):
        is_known = loss + 2 * error <= LITTLE
        text = "Images need no gates" if is_known else "Too few images to tell whether they need gates"
        text += " of their own"
    else:
        text = "Images need their own gates" if loss > LITTLE else "Images gain little from gates of their own"
    text += f": top-1 is {100 * controls['own']:.1f} %"
    for kind, name in (("mean", "the batch's mean gates"), ("another_image", "another image's")):
        one = controls[kind]
        text += f", with {name} {100 * one['accuracy']:.1f} ± {100 * one['standard_error']:.1f} %"
    return text + "."


def _named(numbers: Sequence[int]) -> str:
    """For example: layers 1 to 3 and 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"


def _percent(layers: Sequence[dict[str, Any]], key: str) -> str:
    known = [layer[key] for layer in layers if layer[key] is not None]
    return f"{100 * mean(known):.0f} %" if known else "none"
