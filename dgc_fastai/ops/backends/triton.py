"""`gated_conv2d` by the kernels of triton_kernels.py and triton_skipping.py, which are imported when first used."""

import torch
from torch import Tensor

from ..conv_desc import ConvDesc
from .base import Backend, Gradients, Norm
from .triton_support import triton_runs


class Triton(Backend):
    """All channels, on tensor cores, with the gates on the filters."""

    name = "triton"
    fuses_norm = True
    uses_triton = True

    def is_supported(self, desc: ConvDesc, x: Tensor, weight: Tensor) -> bool:
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and triton_runs(x)

    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        from . import triton_kernels

        return triton_kernels.forward(desc, x, gates, weight, norm)

    def backward(
        self,
        desc: ConvDesc,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        norm: Norm | None = None,
    ) -> Gradients:
        from . import triton_kernels

        return triton_kernels.backward(desc, grad, x, gates, weight, norm)


class TritonSkipping(Triton):
    """The kept channels only. Which of both is faster depends on how many these are; nothing selects it by itself."""

    name = "triton_skipping"

    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        from . import triton_skipping

        scale, shift = norm or (None, None)
        return triton_skipping.forward(x, gates, weight, scale, shift, desc.stride, desc.padding, desc.dilation)

    def backward(
        self,
        desc: ConvDesc,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        norm: Norm | None = None,
    ) -> Gradients:
        from . import triton_skipping

        scale, shift = norm or (None, None)
        geometry = desc.stride, desc.padding, desc.dilation
        return Gradients(*triton_skipping.backward(grad, x, gates, weight, scale, shift, *geometry))
