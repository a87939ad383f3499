"""`torch.autograd.backward` without PyTorch's engine, which asks CUDA for streams, for the fake GPU."""

import heapq
import itertools
from typing import Any

import torch
from torch import Tensor

__all__ = ["backward"]


def backward(roots, gradients=None, retain_graph=None, create_graph=False, inputs=None, **_):
    """`torch.autograd.backward` without PyTorch's engine, which asks CUDA for streams.

    Node by node, the latest first, as the engine does it: it casts and sums gradients to the form of the input, and
    adds up those that meet.
    """
    backward.number += 1
    roots = (roots,) if isinstance(roots, Tensor) else tuple(roots)
    gradients = (gradients,) * len(roots) if gradients is None or isinstance(gradients, Tensor) else gradients
    buffers: dict[Any, list] = {}
    queue: list = []
    numbers = itertools.count()
    waiting: dict[Any, int] = {}

    def give(node, index, gradient):
        slots = buffers.setdefault(node, [None] * len(node._input_metadata))
        if gradient is not None:
            slots[index] = gradient if slots[index] is None else slots[index] + gradient

    def count_edges(nodes):
        seen, stack = set(nodes), list(nodes)
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is not None:
                    waiting[node] = waiting.get(node, 0) + 1
                    if node not in seen:
                        seen.add(node)
                        stack.append(node)

    starts = [root.grad_fn for root in roots]
    count_edges(starts)
    with torch.no_grad():
        for root, gradient in zip(roots, gradients):
            give(root.grad_fn, root.output_nr, torch.ones_like(root) if gradient is None else gradient)
        for node in dict.fromkeys(starts):
            if not waiting.get(node):
                heapq.heappush(queue, (-node._sequence_nr(), next(numbers), node))
        while queue:
            *_, node = heapq.heappop(queue)
            slots = buffers.pop(node)
            if hasattr(node, "variable"):
                _accumulate(node.variable, slots[0])
                continue
            results = _apply(node, slots)
            for (following, index), gradient in zip(node.next_functions, results):
                if following is None:
                    continue
                give(following, index, _formed(gradient, following._input_metadata[index]))
                waiting[following] -= 1
                if not waiting[following]:
                    order = 1 << 62 if hasattr(following, "variable") else following._sequence_nr()
                    heapq.heappush(queue, (-order, next(numbers), following))


backward.number = 0  # of the pass, by which `torch.utils.checkpoint` tells passes apart


def _apply(node, slots) -> tuple:
    if all(slot is None for slot in slots):
        return (None,) * len(node.next_functions)
    call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
    results = call(*slots)
    return results if isinstance(results, tuple) else (results,)


def _formed(gradient: Tensor | None, wanted) -> Tensor | None:
    """A gradient of the shape and type of what it belongs to."""
    if gradient is None:
        return None
    if gradient.shape != torch.Size(wanted.shape):
        gradient = gradient.sum_to_size(wanted.shape)
    assert gradient.device == wanted.device, f"a gradient on {gradient.device} of a tensor on {wanted.device}"
    return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)


def _accumulate(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    assert gradient.device == parameter.device, f"a gradient on {gradient.device} of one on {parameter.device}"
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif all(size == 1 or a == b for size, a, b in zip(gradient.shape, gradient.stride(), parameter.stride())):
        parameter.grad = gradient.detach()
    else:  # gradients are kept in their parameters' layout
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
