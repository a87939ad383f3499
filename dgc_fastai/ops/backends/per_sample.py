"""A convolution of each sample with filters of its own, which two of the backends amount to."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_desc import Pair


def is_pointwise(kernel: tuple[int, ...], padding: Pair) -> bool:
    """Whether the convolution is a matrix product: filters [..., 1, 1] and no padding."""
    return tuple(kernel[-2:]) == (1, 1) and tuple(padding) == (0, 0)


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Gradients of PyTorch's convolution with respect to x and weight."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
    )[:2]


def forward(y: Tensor, x: Tensor, filters: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> None:
    """Fill y [N, O, H', W'], in x's memory format, from x [N, C, H, W] and filters [N, O, C, kh, kw]."""
    if not is_pointwise(filters.shape, padding):
        result = F.conv2d(_one_image(x), filters.flatten(0, 1), None, stride, padding, dilation, groups=len(x))
        y.copy_(result.view(y.shape))
        return
    x, matrices = strided_pixels(x, stride), filters.flatten(2)
    if is_channels_last(x):
        torch.bmm(_pixels(x), matrices.transpose(1, 2), out=_pixels(y))
    else:
        torch.bmm(matrices, x.flatten(2), out=y.flatten(2))


def backward(
    dx: Tensor, grad: Tensor, x: Tensor, filters: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Fill dx, in x's memory format as grad is, with the gradient of x, and return that of the filters."""
    if not is_pointwise(filters.shape, padding):
        result, dfilters = conv2d_backward(
            _one_image(grad), _one_image(x), filters.flatten(0, 1), stride, padding, dilation, groups=len(x)
        )
        dx.copy_(result.view(dx.shape))
        return dfilters.view(filters.shape)
    read, matrices = strided_pixels(x, stride), filters.flatten(2)
    dread = dx if read is x else torch.empty_like(read)
    if is_channels_last(read):
        torch.bmm(_pixels(grad), matrices, out=_pixels(dread))
        dfilters = torch.bmm(_pixels(grad).transpose(1, 2), _pixels(read))
    else:
        torch.bmm(matrices.transpose(1, 2), grad.flatten(2), out=dread.flatten(2))
        dfilters = torch.bmm(grad.flatten(2), read.flatten(2).transpose(1, 2))
    if read is not x:
        dx.zero_()[:, :, :: stride[0], :: stride[1]] = dread
    return dfilters.view(filters.shape)


def strided_pixels(x: Tensor, stride: Pair) -> Tensor:
    """The pixels that 1x1 filters read."""
    if tuple(stride) == (1, 1):
        return x
    return x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=memory_format(x))


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H x W, C], a view if x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _one_image(x: Tensor) -> Tensor:
    """One image with the channels of all samples, which a group convolution separates again."""
    return x.contiguous().flatten(0, 1).unsqueeze(0)
