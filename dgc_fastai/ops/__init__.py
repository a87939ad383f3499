"""The one operation a DGC layer rests on. `reference` defines it; faster kernels are files beside it."""

from torch import Tensor

from . import pointwise, reference

__all__ = ["gated_conv2d"]


def gated_conv2d(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Convolve each sample with its input channels scaled by each head's gates; see `reference.gated_conv2d`.

    The formulation is chosen from the shapes: for 1x1 filters, scaled weights (O x C for each sample) pay as long as
    they are smaller than scaled inputs (heads x C x H x W).
    """
    area = x.shape[2] * x.shape[3] // (stride[0] * stride[1])
    one_by_one = weight.shape[2] == 1 and weight.shape[3] == 1 and padding[0] == 0 and padding[1] == 0
    if one_by_one and weight.shape[0] < gates.shape[1] * area:
        return pointwise.gated_conv2d(x, gates, weight, stride)
    return reference.gated_conv2d(x, gates, weight, stride, padding, dilation)
