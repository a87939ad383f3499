"""Running the operator forward and backward."""

import pytest
import torch

from dgc_fastai.ops import gated_conv2d, kernel, use_backend

needs_compiler = pytest.mark.skipif(kernel.library() is None, reason="there is no C++ compiler here")


def run(backend, tensors, geometry):
    """Output and all gradients."""
    with use_backend(backend):
        y = gated_conv2d(*tensors, *geometry)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        wanted = [part for part in tensors if part is not None]
        return y, *torch.autograd.grad((y * upstream).sum(), wanted)
