"""A run's network on its validation images: confusions, accuracy by class, the most confident mistakes."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...data.classes import class_names
from ...data.epoch_loader import EpochDL
from ...data.loaders import build_dataloaders
from ...inference.deploy import deploy
from ...inference.predict import Predictor
from ...models.gate_statistics import gate_statistics
from ...ops.device import select_device
from ...recipe.machine import check_data
from ...utils.errors import UserError
from .thumbnails import data_uri

__all__ = ["TooLong", "ValidationImages"]

MISTAKES = 24  # pictures in the page
MAX_MATRIX = 25  # classes, up to which the page has the whole confusion matrix
MAX_CONFUSIONS = 30  # pairs of classes, most frequent first


class TooLong(UserError):
    """What would exceed its time."""


class ValidationImages:
    """The validation images of a network's recipe, and what it makes of them.

    Args:
        deadline: of `time.monotonic`; give up as soon as it is clear that it will be missed.
        notify: called after each batch, with the number of batches done and of all.

    Raises:
        UserError: the images are not there or cannot be read, or have other classes by now.
    """

    def __init__(
        self,
        predictor: Predictor,
        deadline: float | None = None,
        notify: Callable[[int, int], None] = lambda done, of: None,
    ):
        self.predictor, self.deadline, self.notify = predictor, deadline, notify
        data = predictor.recipe.data
        check_data(data)
        self.classes = class_names(data)
        if self.classes != predictor.classes:
            raise UserError("the data have other classes than the weights were trained with")
        self.device = select_device("auto")
        predictor.model.to(self.device)
        self.loader: EpochDL = build_dataloaders(data, self.device, self.classes).valid

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, C, H, W] and class numbers [B] on the device.

        Raises:
            TooLong: it would take until after the deadline.
        """
        began, of = time.monotonic(), len(self.loader)
        for number, (images, labels) in enumerate(self.loader):
            yield images.as_subclass(Tensor), labels.as_subclass(Tensor)
            self.notify(number + 1, of)
            if self.deadline is not None and number + 1 < of:
                elapsed, left = time.monotonic() - began, self.deadline - began
                expected = elapsed * of / (number + 1)
                # The first batches start the workers.
                if elapsed > left or (expected > left and elapsed > 1 and number >= 2):
                    raise TooLong(f"left out: it would have taken about {max(expected, elapsed):.0f} s")

    def gate_statistics(self) -> dict[str, Any]:
        """`gate_statistics(...).to_dict()`.

        Raises:
            TooLong: as `batches`.
        """
        return gate_statistics(self.predictor.model, self.batches(), self.classes).to_dict()

    def evaluate(self) -> dict[str, Any]:
        """Confusions, accuracy by class and mistakes.

        Nothing waits for the device before the end; the memory is that of the predictions, and of `MISTAKES` images.

        Returns:
            "images", their number; "top_1" in [0, 1]; "classes", for each the name, the number of images and of those
            that are right; "matrix" [C, C] by true and predicted class, None for many classes; "confusions", the most
            frequent ones; "mistakes", with pictures.

        Raises:
            UserError: there is no image, or one cannot be read.
            TooLong: as `batches`.
        """
        predicted, labels, worst = _predictions(deploy(self.predictor.model), self.batches())
        classes, count, total = self.classes, len(self.classes), len(labels)
        pairs = Counter(zip(labels.tolist(), predicted.tolist()))
        images = torch.bincount(labels, minlength=count).tolist()
        right = [pairs[number, number] for number in range(count)]
        confused = [(pair, times) for pair, times in pairs.most_common() if pair[0] != pair[1]]
        matrix = None
        if count <= MAX_MATRIX:
            matrix = [[pairs[row, column] for column in range(count)] for row in range(count)]
        return {
            "images": total,
            "top_1": sum(right) / total,
            "classes": [
                {"name": name, "images": images[number], "right": right[number]} for number, name in enumerate(classes)
            ],
            "matrix": matrix,
            "confusions": [
                {"true": classes[true], "predicted": classes[wrong], "images": times}
                for (true, wrong), times in confused[:MAX_CONFUSIONS]
            ],
            "mistakes": [self._describe(mistake, total) for mistake in worst],
        }

    def _describe(self, mistake: dict[str, Any], seen: int) -> dict[str, Any]:
        data, index = self.predictor.recipe.data, mistake["index"]
        files = getattr(self.loader.dataset, "items", None)  # not those of sets held in memory
        name = f"validation image {index}"
        if files is not None and seen == self.loader.n:  # none was skipped
            name = "/".join(files[self.loader.indices[index]].parts[-2:])
        return {
            "name": name,
            "true": self.classes[mistake["true"]],
            "predicted": self.classes[mistake["predicted"]],
            "probability": mistake["probability"],
            "picture": data_uri(mistake["image"], data),
            "side": data.image_size,
        }


@torch.inference_mode()
def _predictions(
    network: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Predicted and true classes [N] on the CPU, and the most confident mistakes, the most confident first."""
    predicted, labels = [], []
    worst: dict[str, Tensor] = {}
    seen = 0
    for images, truth in batches:
        probability, guess = network(images).float().softmax(1).nan_to_num(0).max(1)
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
