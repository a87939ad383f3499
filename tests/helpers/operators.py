"""Running the operator forward and backward."""

import pytest
import torch

from dgc_fastai.ops.backends import cpu
from dgc_fastai.ops.gated_conv2d import gated_conv2d, use_formulation

needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="there is no C++ compiler here")


def run(way, tensors, geometry):
    """Output and all gradients."""
    with use_formulation(way):
        y = gated_conv2d(*tensors, *geometry)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        wanted = [part for part in tensors if part is not None]
        return y, *torch.autograd.grad((y * upstream).sum(), wanted)
