"""Resizing on the device."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dgc_fastai.data.resizing import flatten_crops, resize_crops

SIZES = [
    [(10, 50), (72, 72), (36, 36), (37, 70), (1, 1), (1, 72), (100, 3)],
    [(448, 448), (224, 224), (300, 201), (17, 440)],
    [(5, 9)],
]


class Operators(TorchDispatchMode):
    """Counts what is dispatched, views included."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def random_crops(sizes):
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8).permute(2, 0, 1) for size in sizes]


@pytest.mark.parametrize("size", [8, 36, 224])
@pytest.mark.parametrize("sizes", SIZES, ids=["small", "as ImageNet's", "one"])
def test_crops_of_any_size_are_resized_as_by_interpolation(sizes, size):
    crops = random_crops(sizes)
    resized = resize_crops(flatten_crops(crops), size)
    assert resized.shape == (len(crops), 3, size, size) and resized.dtype == torch.uint8 and resized.is_contiguous()
    floats = (crop[None].float() for crop in crops)
    exact = torch.cat([F.interpolate(one, (size, size), mode="bilinear", antialias=True) for one in floats])
    assert (resized - exact).abs().max() < 0.75  # gray levels; half of one is the rounding to bytes
    assert (resized - exact.round()).abs().mean() < 0.1


def test_the_number_of_operators_does_not_depend_on_the_batch():
    counts = set()
    for batch in (1, 3, 40):
        crops = flatten_crops(random_crops([(20 + n, 60 - n) for n in range(batch)]))
        with Operators() as seen:
            resize_crops(crops, 32)
        counts.add(seen.count)
    assert len(counts) == 1 and counts.pop() < 100
