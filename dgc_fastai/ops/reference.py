"""The definition of `gated_conv2d` in plain PyTorch, as the authors' code computes it. Every backend must equal it.

It makes a scaled copy of the input for each head, and autograd keeps them all: for tests, not for training.
"""

import torch.nn.functional as F
from torch import Tensor

from .gates import spread_blocks


def gated_conv2d(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Convolve each sample with its input channels scaled by each head's gates (paper, section 3).

    Output channel `o` belongs to head `o % heads`: heads are interleaved, so channel `j * heads + h` is
    filter `j` of head `h`. A gate of zero removes its channel from that sample and head, and no gradient comes
    back to it: both the ReLU and the selection that can have made it zero would stop it anyway.

    Args:
        x: input [B, C, H, W].
        gates: [B, heads, G], not negative; those of dropped channels are zero. G = C, or fewer where blocks of C / G
            neighboring channels share a gate.
        weight: filters [O, C, kh, kw], with O divisible by heads.
        scale, shift: [C] each; with them the input is `relu(x * scale + shift)`, a folded batch norm and its ReLU.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.

    Returns:
        [B, O, H', W'].

    Raises:
        ValueError: the gates are neither one for each channel, nor one for each block.
    """
    heads = gates.shape[1]
    if scale is not None and shift is not None:
        x = apply_norm(x, scale, shift)
    gates = spread_blocks(gates.masked_fill(gates == 0, 0), x.shape[1]).to(x.dtype)
    copies = (x.unsqueeze(1) * gates.unsqueeze(-1).unsqueeze(-1)).flatten(1, 2)
    filters = weight.unflatten(0, (-1, heads)).transpose(0, 1).flatten(0, 1)  # a head's filters side by side
    y = F.conv2d(copies, filters, None, stride, padding, dilation, groups=heads)
    return y.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1, 2)


def apply_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`relu(x * scale + shift)`, computed in float32 and returned in x's type."""
    scale, shift = scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
    return F.relu(x * scale + shift).to(x.dtype)
