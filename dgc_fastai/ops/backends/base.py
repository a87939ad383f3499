"""What a backend of `gated_conv2d` is."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from ..conv_desc import ConvDesc
from .per_sample import memory_format

__all__ = ["Backend", "Gradients", "Norm"]


class Norm(NamedTuple):
    """A folded batch norm: [C] each."""

    scale: Tensor
    shift: Tensor


class Gradients(NamedTuple):
    """Of the arguments of the same names; those of scale and shift with a norm only.

    A backend that `fuses_norm` can leave sums over a first dimension to whoever uses them: those of gates, scale,
    shift, and of the weight, then in float32 [parts, O * C * kh * kw], in the order in which the weight lies in memory,
    contiguous or channels-last.
    """

    x: Tensor
    gates: Tensor
    weight: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def summed(self, weight: Tensor) -> "Gradients":
        """The same with no sums left to do, and the weight's as the weight."""
        dgates, dweight = self.gates, self.weight
        if dgates.dim() == 4:
            dgates = dgates.sum(0)
        if dweight.dim() == 2:
            weight = weight.contiguous(memory_format=memory_format(weight))
            dweight = dweight.sum(0).as_strided(weight.shape, weight.stride()).to(weight.dtype)
        norm = (part if part is None or part.dim() == 1 else part.sum(0) for part in (self.scale, self.shift))
        return Gradients(self.x, dgates, dweight, *norm)


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

    uses_triton: bool = False
    """Whether it computes by Triton kernels, so that those around the convolution can be used, too."""

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
