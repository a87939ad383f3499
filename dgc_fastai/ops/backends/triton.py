"""`gated_conv2d` by Triton kernels, which are imported when first used; see triton_kernels.py."""

import functools
import importlib.util

import torch
from torch import Tensor

from ..conv_desc import ConvDesc
from .base import Backend, Gradients, Norm


class Triton(Backend):
    name = "triton"
    fuses_norm = True

    def is_supported(self, desc: ConvDesc, x: Tensor, weight: Tensor) -> bool:
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and _is_installed()

    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        from . import triton_kernels

        scale, shift = norm or (None, None)
        return triton_kernels.forward(x, gates, weight, scale, shift, desc.stride, desc.padding, desc.dilation)

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

        scale, shift = norm or (None, None)
        geometry = desc.stride, desc.padding, desc.dilation
        return Gradients(*triton_kernels.backward(grad, x, gates, weight, scale, shift, *geometry))


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
