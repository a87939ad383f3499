"""Accuracies, as shares in [0, 1]."""

import torch
from fastai.metrics import accuracy, top_k_accuracy


def top_1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of images whose likeliest class is the right one."""
    return accuracy(prediction, target)


def top_5(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of images whose right class is among the five likeliest."""
    return top_k_accuracy(prediction, target, k=min(5, prediction.shape[-1]))
