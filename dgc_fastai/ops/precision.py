"""How float32 is multiplied on a GPU: as its convolutions may be, by TF32 or exactly, whatever computes a layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["convolutions_use_tf32", "products_like_convolutions"]


def convolutions_use_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


@contextmanager
def products_like_convolutions(x: Tensor) -> Iterator[None]:
    """A matrix product that stands for a convolution of x may use TF32 where a convolution may, and only there."""
    if not (x.is_cuda and x.dtype == torch.float32):
        yield
        return
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        products.fp32_precision = before
