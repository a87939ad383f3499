"""What a backend of `gated_conv2d` is."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from ..conv_desc import ConvDesc

__all__ = ["Backend", "Gradients", "Norm"]


class Norm(NamedTuple):
    """A folded batch norm: [C] each."""

    scale: Tensor
    shift: Tensor


class Gradients(NamedTuple):
    """Of the arguments of the same names; those of scale and shift with a norm only."""

    x: Tensor
    gates: Tensor
    weight: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None


class Backend(ABC):
    """One way to compute `reference.gated_conv2d` and its gradients.

    To add one: derive from this class in a file of its own, add an instance to `selection.BACKENDS`, say in
    `selection.fastest_backend` where it is to be used, and run the tests in tests/ops, which compare all that are in
    BACKENDS with the definition.
    """

    name: str
    fuses_norm: bool = False
    """Whether it applies the normalization and the ReLU before the convolution itself, where it reads x. If so, it is
    given a `norm`, and x with any strides; if not, x is given as it is to be convolved, contiguous or channels-last."""

    def is_supported(self, desc: ConvDesc, x: Tensor, weight: Tensor) -> bool:
        """Whether it can compute such a layer here. `x` may be in any memory format."""
        return True

    @abstractmethod
    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        """As `reference.gated_conv2d`.

        Args:
            x: [B, C, H, W].
            gates: [B, heads, C].
            weight: [O, C, kh, kw].
            norm: see `fuses_norm`.

        Returns:
            [B, O, H', W'].
        """

    @abstractmethod
    def backward(
        self,
        desc: ConvDesc,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        norm: Norm | None = None,
    ) -> Gradients:
        """The gradients of the arguments of `forward` from that of its result. Those of gates that are zero are zero if
        the backend `fuses_norm`, and may be anything if not."""
