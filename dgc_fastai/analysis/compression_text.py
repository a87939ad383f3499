"""What a compression was worth, in words. Imports no torch.

A compression is what `summary.json` holds under this name: `before` and `after`, with accuracy and cost, and `speed`.
"""

import shlex
from collections.abc import Iterator
from typing import Any

from .benchmark_text import decimal_places, plural, rounded

__all__ = ["advice", "answer", "fastest", "milliseconds", "page_data", "runtime_title", "speedup", "verdict"]

NOISE = 0.05  # ratios closer to 1 are no difference
MOSTLY = 0.7  # share of the MACs
MUCH = 0.005  # of top-1: what a compression is to lose at most

Found = dict[str, Any]


def runtime_title(row: Found) -> str:
    """Such as "before, ONNX Runtime, float32"."""
    return f"{row['network']}, {row['runtime']}, {row['precision']}"


def milliseconds(row: Found) -> str:
    """The median, with as many digits as its spread allows."""
    median, noise = row["median"], row["max"] / row["min"] - 1
    return rounded(median, min(2, decimal_places(median, noise)))


def fastest(found: Found, network: str, batch: int, precision: str | None = None) -> Found | None:
    """The fastest row of a network, "before" or "after", in a precision or in any."""
    rows = [row for row in found["speed"]["rows"] if row["network"] == network and row["batch"] == batch]
    rows = [row for row in rows if precision in (None, row["precision"])]
    return min(rows, key=lambda row: row["median"], default=None)


def speedup(found: Found, batch: int, precision: str | None = None) -> float | None:
    """How many times as fast the compressed network is as the fastest dense form."""
    dense, ours = (fastest(found, network, batch, precision) for network in ("before", "after"))
    return dense["median"] / ours["median"] if dense and ours else None


def batches(found: Found) -> list[int]:
    return sorted({row["batch"] for row in found["speed"]["rows"]})


def answer(found: Found) -> str:
    """The sentence that one came for: what the network was, and what it became, for one image in float32."""
    before, after = found["before"], found["after"]
    dense, ours = (fastest(found, network, 1, "float32") for network in ("before", "after"))
    assert dense and ours
    return (
        f"{before['arch']}, {_percent(before['top_1'])} at {milliseconds(dense)} ms, became a network of "
        f"{_percent(after['top_1'])} at {milliseconds(ours)} ms."
    )


def verdict(found: Found) -> str:
    """Whether it is faster than the fastest dense form, in float32 and in all."""
    ratio = speedup(found, 1, "float32")
    dense, ours, fastest_dense = (
        fastest(found, "before", 1, "float32"),
        fastest(found, "after", 1),
        fastest(found, "before", 1),
    )
    assert ratio and dense and ours and fastest_dense
    form = f"dense in {_place(dense)}, the fastest dense form in float32"
    if ratio <= 1 + NOISE:
        text = f"It is not faster: {ratio:.2f} x the speed of {form}."
    else:
        text = f"It is {ratio:.2f} x as fast as {form}."
    if fastest_dense["precision"] != "float32" and fastest_dense["median"] < ours["median"]:
        text += (
            f" In bf16 the dense network takes {milliseconds(fastest_dense)} ms in {_place(fastest_dense)}, which is "
            "faster still."
        )
    return text


def advice(found: Found) -> list[str]:
    """What to try if it is not faster than the fastest dense form of all, or has lost accuracy."""
    lines = []
    if (speedup(found, 1) or 0) <= 1 + NOISE:
        lines += list(_faster(found))
    if found["before"]["top_1"] - found["after"]["top_1"] > MUCH:
        lines += list(_more_accurate(found))
    return lines


def _faster(found: Found) -> Iterator[str]:
    share = found["after"]["gated_share"]
    if share < MOSTLY:
        yield (
            f"Only {100 * share:.0f} % of its MACs are in layers that have gates now; the others have groups, such as "
            "depthwise convolutions, or few channels. Networks of ordinary convolutions, such as ResNets, gain more."
        )
    size = 2 * found["input"][-1]
    yield f"Larger images (data.size={size}): in small ones, what surrounds the convolutions takes most of the time."
    share = found["after"]["macs"] / found["before"]["macs"]
    yield f"A higher share cut, such as model.convert.target={max(0.1, share - 0.15):.2g}, of the dense network's MACs."
    yield "Fewer layers: model.convert.skip, for those with few channels or pixels; `check RECIPE --layers` lists them."
    dense = fastest(found, "before", 1)
    if dense and dense["runtime"] != "PyTorch":
        yield f"Or take the dense network, in {_place(dense)} and {dense['precision']}."


def _more_accurate(found: Found) -> Iterator[str]:
    if not found["teacher"]:
        yield "For accuracy: train.teacher=before, so that the network learns from the one before."
    yield "For accuracy: more train.epochs, or a lower share cut (a larger model.convert.gate_factor or target)."


def cost_rows(found: Found) -> Iterator[tuple[str, ...]]:
    """Name, before, after and change of accuracy and cost."""
    before, after = found["before"], found["after"]
    loss = 100 * (after["top_1"] - before["top_1"])
    yield "top-1", _percent(before["top_1"]), _percent(after["top_1"]), f"{loss:+.2f} points"
    for name, key, unit, size in (
        ("MACs", "macs", "M", 1e6),
        ("parameters", "parameters", "M", 1e6),
        ("file", "bytes", "MB", 1e6),
    ):
        cells = (f"{one[key] / size:,.2f} {unit}" for one in (before, after))
        yield name, *cells, f"{after[key] / before[key]:.2f} x"


def speed_rows(found: Found, precision: str) -> Iterator[tuple[str, ...]]:
    """Title and milliseconds of each form in a precision, and how many times as fast the compressed network is."""
    rows = [row for row in found["speed"]["rows"] if row["precision"] == precision]
    for form in dict.fromkeys((row["network"], row["runtime"]) for row in rows):
        cells = {row["batch"]: milliseconds(row) for row in rows if (row["network"], row["runtime"]) == form}
        yield ", ".join(form), *(cells.get(one, "") for one in batches(found))
    ratios = (speedup(found, batch, precision) for batch in batches(found))
    yield "speedup", *(f"{ratio:.2f} x" if ratio else "" for ratio in ratios)


def precisions(found: Found) -> list[str]:
    return list(dict.fromkeys(row["precision"] for row in found["speed"]["rows"]))


def machine_line(found: Found) -> str:
    machine = found["speed"]["machine"]
    threads = f", {plural(machine['threads'], 'thread')}" if machine["device"] == "cpu" else ""
    return f"{machine['processor']}{threads}, torch {machine['torch']}; medians of interleaved rounds."


def page_data(found: Found) -> Found:
    """What a report's page shows of a compression: sentences, and the cells of two tables."""
    return {
        "answer": answer(found),
        "lines": [verdict(found), how_trained(found), machine_line(found), *found["speed"]["left_out"]],
        "advice": advice(found),
        "cost": list(cost_rows(found)),
        "batches": [batch_title(batch) for batch in batches(found)],
        "speed": [[precision, *row] for precision in precisions(found) for row in speed_rows(found, precision)],
    }


def batch_title(batch: int) -> str:
    return "one image" if batch == 1 else f"{batch} images"


def deployment(program: str, folder: str) -> list[str]:
    """The files to deploy, and the lines that use them."""
    word = shlex.quote(folder)
    return [
        f"To deploy: {folder}/best.safetensors",
        f"  {program} predict {word} IMAGE ...",
        f"  python: deploy(Predictor.from_weights({folder!r}).model)",
        f"  {program} export {word} network.pt2",
    ]


def how_trained(found: Found) -> str:
    """A footnote: for how long each of the two was trained here."""
    before, after = found["before"]["epochs"], plural(found["after"]["epochs"], "epoch")
    had = (
        f"The dense network was trained for {plural(before, 'epoch')} here" if before else "The dense network was given"
    )
    return f"{had}, and the compressed one for {after} more, which might have raised the dense one, too."


def _place(row: Found) -> str:
    return "PyTorch with `deploy`" if row["runtime"] == "deployed" else row["runtime"]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
