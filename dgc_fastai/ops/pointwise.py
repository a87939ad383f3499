"""`gated_conv2d` for 1x1 filters: scale the weights, not the input.

The reference makes `heads` scaled copies of the input, and autograd keeps them. For a 1x1 convolution the gates can
as well scale the filters of each sample, which then is one matrix product for all heads: the same numbers from a
copy of O x C weights instead of heads x C x H x W activations.
"""

import torch
from torch import Tensor


def gated_conv2d(x: Tensor, gates: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """As `reference.gated_conv2d`, for filters [O, C, 1, 1] and no padding."""
    batch, channels = x.shape[:2]
    heads = gates.shape[1]
    if stride[0] > 1 or stride[1] > 1:
        x = x[:, :, :: stride[0], :: stride[1]]
    # Heads are interleaved: [O, C] read as [O / heads, heads, C] has the heads in the middle.
    filters = weight.reshape(1, -1, heads, channels) * gates.unsqueeze(1)
    product = torch.bmm(filters.reshape(batch, -1, channels).to(x.dtype), x.flatten(2))
    return product.reshape(batch, -1, x.shape[2], x.shape[3])
