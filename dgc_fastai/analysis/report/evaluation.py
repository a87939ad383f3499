"""A run's network on its validation images: confusions, accuracy by class, the most confident mistakes."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...data.classes import class_names
from ...data.epoch_loader import EpochDL
from ...data.loaders import build_dataloaders
from ...inference.deploy import deploy
from ...inference.predict import Predictor
from ...ops.device import select_device
from ...recipe.machine import check_data
from ...utils.errors import UserError
from .thumbnails import data_uri

__all__ = ["evaluate_validation"]

MISTAKES = 24  # pictures in the page
MAX_MATRIX = 25  # classes, up to which the page has the whole confusion matrix
MAX_CONFUSIONS = 30  # pairs of classes, most frequent first


class TooLong(UserError):
    """An evaluation that would exceed its time."""


def evaluate_validation(
    predictor: Predictor, seconds: float | None = None, notify: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, Any]:
    """What a network says of the validation images of its recipe.

    The images are read once. Nothing waits for the device before the end; the memory is that of the predictions, and of
    `MISTAKES` images.

    Args:
        seconds: give up, once it is clear that more time is needed.
        notify: called after each batch, with the number of batches done and of all.

    Returns:
        "images", their number; "top_1" in [0, 1]; "classes", for each the name, the number of images and of those that
        are right; "matrix" [C, C] by true and predicted class, None for many classes; "confusions", the most frequent
        ones; "mistakes", with pictures.

    Raises:
        UserError: the images are not there or cannot be read, have other classes by now, or it takes too long.
    """
    recipe = predictor.recipe
    check_data(recipe.data)
    classes = class_names(recipe.data)
    if classes != predictor.classes:
        raise UserError("the data have other classes than the weights were trained with")
    device = select_device("auto")
    loader: EpochDL = build_dataloaders(recipe.data, device, classes).valid
    network = deploy(predictor.model.to(device))
    predicted, labels, worst = _predictions(network, loader, seconds, notify)
    count, total = len(classes), len(labels)
    pairs = Counter(zip(labels.tolist(), predicted.tolist()))
    images = torch.bincount(labels, minlength=count).tolist()
    right = [pairs[number, number] for number in range(count)]
    confused = [(pair, times) for pair, times in pairs.most_common() if pair[0] != pair[1]]
    names = _image_names(loader, total)
    return {
        "images": total,
        "top_1": sum(right) / total if total else None,
        "classes": [
            {"name": name, "images": images[number], "right": right[number]} for number, name in enumerate(classes)
        ],
        "matrix": [[pairs[row, column] for column in range(count)] for row in range(count)]
        if count <= MAX_MATRIX
        else None,
        "confusions": [
            {"true": classes[true], "predicted": classes[wrong], "images": times}
            for (true, wrong), times in confused[:MAX_CONFUSIONS]
        ],
        "mistakes": [
            {
                "name": names[mistake["index"]] if names else f"validation image {mistake['index']}",
                "true": classes[mistake["true"]],
                "predicted": classes[mistake["predicted"]],
                "probability": mistake["probability"],
                "picture": data_uri(mistake["image"], recipe.data),
                "side": recipe.data.image_size,
            }
            for mistake in worst
        ],
    }


@torch.inference_mode()
def _predictions(
    network: torch.nn.Module, loader: EpochDL, seconds: float | None, notify: Callable[[int, int], None]
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Predicted and true classes [N] on the CPU, and the most confident mistakes, the most confident first."""
    predicted, labels = [], []
    worst: dict[str, Tensor] = {}
    began, seen = time.monotonic(), 0
    for number, (x, y) in enumerate(loader):
        images, truth = x.as_subclass(Tensor), y.as_subclass(Tensor)
        probability, guess = network(images).float().softmax(1).max(1)
        predicted.append(guess)
        labels.append(truth)
        found = {
            "score": torch.where(guess != truth, probability, -1.0),
            "index": torch.arange(seen, seen + len(truth), device=truth.device),
            "true": truth,
            "predicted": guess,
            "image": images,
        }
        seen += len(truth)
        worst = _best(found, worst)
        notify(number + 1, len(loader))
        _check_time(time.monotonic() - began, number + 1, len(loader), seconds)
    if not labels:
        raise UserError("there are no validation images")
    known = {name: values.cpu() for name, values in worst.items()}
    mistakes = [
        {
            "index": int(known["index"][place]),
            "true": int(known["true"][place]),
            "predicted": int(known["predicted"][place]),
            "probability": float(score),
            "image": known["image"][place],
        }
        for place, score in enumerate(known["score"].tolist())
        if score >= 0
    ]
    return torch.cat(predicted).cpu(), torch.cat(labels).cpu(), mistakes


def _best(new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `MISTAKES` entries of the highest score among both."""
    order = new["score"].topk(min(MISTAKES, len(new["score"]))).indices
    new = {name: values[order] for name, values in new.items()}
    if old:
        new = {name: torch.cat([old[name], values]) for name, values in new.items()}
        order = new["score"].argsort(descending=True, stable=True)[:MISTAKES]
        new = {name: values[order] for name, values in new.items()}
    return new


def _check_time(elapsed: float, done: int, batches: int, seconds: float | None) -> None:
    if seconds is None:
        return
    expected = elapsed * batches / done
    if elapsed > seconds or (expected > seconds and elapsed > 1 and done > 2):  # the first batches start the workers
        raise TooLong(f"it would have taken about {max(expected, elapsed):.0f} s")


def _image_names(loader: EpochDL, seen: int) -> list[str] | None:
    """Class folder and name of each validation file; None for sets held in memory, and where images were skipped."""
    items = getattr(loader.dataset, "items", None)
    if items is None or seen != loader.n:
        return None
    return ["/".join(items[index].parts[-2:]) for index in loader.indices]
