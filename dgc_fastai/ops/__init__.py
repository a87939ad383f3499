"""The one operation a DGC layer rests on. `reference` defines it; faster kernels are files beside it."""

from .reference import gated_conv2d

__all__ = ["gated_conv2d"]
