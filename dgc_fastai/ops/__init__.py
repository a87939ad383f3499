"""The operator of a DGC layer: its definition, its backends and the choice among them; csrc/ holds the C++ kernel."""

from .operator import gated_conv2d
from .selection import BACKENDS, select_backend, use_backend

__all__ = ["BACKENDS", "gated_conv2d", "select_backend", "use_backend"]
