"""Accuracies in [0, 1]."""

import torch
from fastai.metrics import accuracy, top_k_accuracy


def top_1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of images whose most probable class is the target; predictions [N, classes], targets [N]."""
    return accuracy(prediction, target)


def top_5(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of images whose target is among the five most probable classes; predictions [N, classes], targets [N]."""
    return top_k_accuracy(prediction, target, k=min(5, prediction.shape[-1]))
