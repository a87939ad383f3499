"""Measures of what the heads of a layer keep, from counts.

h(p) = -p log2 p - (1 - p) log2 (1 - p), in bits, is the entropy of a channel that a share p of the images keeps. Each
measure is an array with a number for each head, NaN where it is not defined. docs/gates.md says what they tell.
"""

import numpy as np

from .gate_counts import LayerCounts

__all__ = ["PER_HEAD", "measure_layer"]

PER_HEAD = (
    "kept_share",
    "usage_entropy",
    "fixed_share",
    "mutual_information",
    "mutual_information_permuted",
    "class_information",
    "class_share",
    "overlap_heads",
    "overlap_images",
    "overlap_same_class",
    "overlap_different_class",
    "gate_mean",
    "gate_std",
)

PERMUTATIONS = 5  # of the labels; the mean over the channels is precise by itself


def measure_layer(counts: LayerCounts, most_kept: int) -> dict[str, np.ndarray]:
    """The measures `PER_HEAD` of a layer.

    Args:
        counts: of the layer.
        most_kept: how many channels a head can keep.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        measures = {
            **_usage(counts, most_kept),
            **_information(counts),
            **_overlap_of_images(counts),
            "overlap_heads": _overlap_of_heads(counts),
        }
    return {**measures, "gate_mean": counts.gate_mean, "gate_std": counts.gate_std}


def _usage(counts: LayerCounts, most_kept: int) -> dict[str, np.ndarray]:
    """How unequal images are: the mean entropy of a channel's use, of that which as many channels kept at random have;
    and what a fixed selection, of the channels kept most often, has in common with theirs."""
    used = counts.kept.sum(0) / counts.images.sum()
    kept_share = used.mean(1)
    at_random = _entropy(kept_share)
    entropy = np.where(at_random > 0, _entropy(used).mean(1) / at_random, 0)
    fixed = -np.sort(-used, 1)[:, :most_kept]
    return {"kept_share": kept_share, "usage_entropy": entropy, "fixed_share": fixed.sum(1) / used.sum(1)}


def _information(counts: LayerCounts) -> dict[str, np.ndarray]:
    """What one channel, kept or not, and the class tell of each other, as a mean over the channels.

    With finite data this is above zero by chance. How much, is what is left of it after the labels have been permuted:
    each count by class then has a hypergeometric distribution, from which it is drawn."""
    there = counts.images > 0
    kept, images = counts.kept[there], counts.images[there]
    names = "mutual_information", "mutual_information_permuted", "class_information", "class_share"
    if not counts.has_classes:
        return dict.fromkeys(names, np.full(kept.shape[1], np.nan))
    total, sizes = images.sum(), images[:, None, None]
    of_channel = _entropy(kept.sum(0) / total).mean(1)

    def information(by_class: np.ndarray) -> np.ndarray:
        given_class = (sizes / total * _entropy(by_class / sizes)).sum(-3)
        return np.maximum(of_channel - given_class.mean(-1), 0)

    real, rng = information(kept), np.random.default_rng(0)
    drawn = [information(rng.hypergeometric(sizes, total - sizes, kept.sum(0))) for _ in range(PERMUTATIONS)]
    permuted = np.mean(drawn, 0)
    share = np.where(of_channel > 0, (real - permuted) / of_channel, 0)
    return dict(zip(names, (real, permuted, real - permuted, share)))


def _overlap_of_images(counts: LayerCounts) -> dict[str, np.ndarray]:
    """The share of kept channels that two images have in common, as a mean over all pairs: the k images of a class that
    keep a channel are k (k - 1) ordered pairs that have it in common."""
    kept, images = counts.kept.astype(float), counts.images.astype(float)
    whole, total = kept.sum(0), images.sum()
    mean = whole.sum(1) / total
    same, pairs = (kept * (kept - 1)).sum((0, 2)), (images * (images - 1)).sum()
    every, all_pairs = (whole * (whole - 1)).sum(1), total * (total - 1)
    undefined = np.full(len(mean), np.nan)
    return {
        "overlap_images": every / all_pairs / mean if total > 1 else undefined,
        "overlap_same_class": same / pairs / mean if counts.has_classes and pairs else undefined,
        "overlap_different_class": (every - same) / (all_pairs - pairs) / mean if all_pairs > pairs else undefined,
    }


def _overlap_of_heads(counts: LayerCounts) -> np.ndarray:
    """The share of kept channels that a head has in common with each other one, in the same image."""
    together, heads = counts.together.astype(float), len(counts.together)
    kept = together.diagonal()
    shares = together / ((kept[:, None] + kept) / 2)
    return (shares.sum(1) - shares.diagonal()) / (heads - 1) if heads > 1 else np.full(1, np.nan)


def _entropy(p: np.ndarray) -> np.ndarray:
    """h(p)."""
    p = np.clip(p, 0, 1)
    inner = np.where((p > 0) & (p < 1), p, 0.5)
    return np.where((p > 0) & (p < 1), -inner * np.log2(inner) - (1 - inner) * np.log2(1 - inner), 0)
