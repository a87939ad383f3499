"""Learning from a teacher."""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback

from ...inference.deploy import deploy
from ...ops.device import select_channels_last
from .order import DISTILLATION


class Distillation(Callback):
    """Trains a network towards the answers of another one, its teacher, to the very images of each batch.

    In training, the loss that is differentiated becomes (1 - weight) x loss + weight x T² KL(teacher || network), the
    divergence of the two distributions softened by the temperature T, averaged over the images; the loss that is logged
    stays as it is. The teacher is frozen and deployed (see `deploy`), and computes in the precision of the network, on
    the images that it sees: mixed ones, too.

    Args:
        teacher: a network for the same images, with the same classes in the same order. It stays as it is.
        weight: share of the teacher in the loss, in [0, 1].
        temperature: of both distributions, more than 0.

    Raises:
        ValueError: in the first batch, if the teacher has other classes.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    order = DISTILLATION
    state_key = "distillation"

    def __init__(self, teacher: torch.nn.Module, weight: float = 0.5, temperature: float = 4.0):
        self.teacher, self.weight, self.temperature = deploy(teacher), weight, temperature
        self.fingerprint = _fingerprint(teacher)  # not of what `deploy` makes of it, which other versions do otherwise

    def before_train(self):
        self.teacher.to(next(self.model.parameters()).device)

    def after_loss(self):
        if not self.training:
            return
        pred = self.pred.as_subclass(torch.Tensor)
        with torch.no_grad():
            answers = self.teacher(*map(self._in_format, self.xb)).as_subclass(torch.Tensor)
        if answers.shape != pred.shape:
            raise ValueError(f"the teacher's output is {list(answers.shape)}, and the network's {list(pred.shape)}")
        ours, theirs = ((logits.float() / self.temperature).log_softmax(1) for logits in (pred, answers))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2
        self.learn.loss_grad = (1 - self.weight) * self.learn.loss_grad + self.weight * divergence

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["teacher"] != self.fingerprint:
            raise ValueError("the teacher's weights are not those that the run began with")

    def _in_format(self, x: torch.Tensor) -> torch.Tensor:
        """Images in the memory format that suits the device."""
        if x.dim() == 4 and select_channels_last(None, x.device):
            return x.contiguous(memory_format=torch.channels_last)
        return x


def _fingerprint(network: torch.nn.Module) -> str:
    """A hash of a network's weights."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(name.encode() + content.tobytes())
    return found.hexdigest()
