"""The selection of channels: pooled features -> gates -> the smallest dropped, all in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pool(x: Tensor) -> Tensor:
    """Mean over the pixels, in float32: [B, C, H, W] -> [B, C].

    A sum, whose gradient is a view, rather than `mean`, which allocates a gradient as large as x.
    """
    return x.sum((2, 3), dtype=torch.float32) / (x.shape[2] * x.shape[3])


def head_gates(pooled: Tensor, squeeze: Tensor, excite: Tensor, bias: Tensor) -> Tensor:
    """The gates of all heads: `relu(W2 relu(W1 a) + b)`, one W1, W2, b per head (paper, section 3).

    Args:
        pooled: a [B, C].
        squeeze: W1 [heads, hidden, C].
        excite: W2 [heads, G, hidden], with G = C, or fewer where blocks of C / G neighboring channels share a gate.
        bias: b [heads, G].

    Returns:
        [B, heads, G] in float32, under autocast as well: rounded to bfloat16, gates near one become equal, and
        `drop_smallest` drops all that are equal to its threshold.
    """
    if not torch.jit.is_scripting():  # TorchScript knows no autocast, and the meta device has none
        device = pooled.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _head_gates(pooled, squeeze, excite, bias)
    return _head_gates(pooled, squeeze, excite, bias)


def _head_gates(pooled: Tensor, squeeze: Tensor, excite: Tensor, bias: Tensor) -> Tensor:
    squeezed = F.relu(F.linear(pooled.float(), squeeze.float().flatten(0, 1)))  # all heads in one product
    squeezed = squeezed.unflatten(1, squeeze.shape[:2]).transpose(0, 1)
    excited = torch.baddbmm(bias.float().unsqueeze(1), squeezed, excite.float().transpose(1, 2))
    return F.relu(excited).transpose(0, 1)


def drop_smallest(gates: Tensor, count: Tensor, granularity: int = 1) -> Tensor:
    """Zero every gate that is not above its row's `count`-th smallest, ties included (paper, section 3).

    Args:
        gates: [..., G], each of `granularity` neighboring channels. NaN counts as larger than any number.
        count: how many channels to drop, an integer tensor of no dimensions, in [0, G * granularity]; 0 drops nothing,
            and what is no whole block is not dropped. To read it as a Python number would stall a GPU at every layer
            and recompile a compiled model whenever it changes. So this is done in eager mode on a CPU only, where it
            saves the sorting.
    """
    if granularity > 1:
        count = count // granularity
    if not torch.jit.is_scripting():
        if gates.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            if count == 0:
                return gates
            threshold = gates.detach().kthvalue(int(count), dim=-1, keepdim=True).values
            return gates.masked_fill(gates <= threshold, 0)
    ascending = gates.detach().sort(dim=-1).values
    threshold = ascending.index_select(-1, (count - 1).clamp(min=0).reshape(1))
    return gates.masked_fill((gates <= threshold) & (count > 0), 0)


def spread_blocks(blocks: Tensor, channels: int, dim: int = -1) -> Tensor:
    """What each channel has, from what its block has: along `dim`, G values become `channels`, those of block k for its
    channels [k * g, (k + 1) * g) with g = channels / G.

    Raises:
        ValueError: the channels are no whole number of blocks.
    """
    dim = dim % blocks.dim()
    count = blocks.shape[dim]
    if count == channels:
        return blocks
    if channels % count:
        raise ValueError(f"{count} gates do not divide {channels} input channels")
    sizes = [-1] * (blocks.dim() + 1)
    sizes[dim + 1] = channels // count
    return blocks.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)
