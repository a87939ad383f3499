"""The definition of `gated_conv2d` in plain PyTorch. Every faster kernel must equal it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_conv2d(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Convolve each sample with its input channels scaled by each head's gates (paper, section 3).

    Output channel `o` belongs to head `o % heads`: heads are interleaved, so channel `j * heads + h` is
    filter `j` of head `h`. A gate of zero removes its channel from that sample and head.

    Args:
        x: input [B, C, H, W], already normalised and rectified.
        gates: [B, heads, C]; dropped channels are zero.
        weight: filters [O, C, kh, kw], with O divisible by heads.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.

    Returns:
        [B, O, H', W'].
    """
    heads = gates.shape[1]
    scale = gates.to(x.dtype).unsqueeze(-1).unsqueeze(-1)
    outputs = [
        F.conv2d(x * scale[:, head], weight[head::heads], None, stride, padding, dilation) for head in range(heads)
    ]
    return torch.stack(outputs, dim=2).flatten(1, 2)
