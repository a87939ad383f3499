"""Whether the Triton kernels around a layer's convolution run on this GPU: tried once, on a small layer.

They compute every layer of a GPU, while no GPU has run them so far. Where they do not compile, or their numbers are
wrong, PyTorch's operators take their place, and a warning says so.
"""

import functools
import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.base import Norm
from .backends.triton_support import triton_runs
from .gates import drop_smallest, head_gates, pool

__all__ = ["triton_works"]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

INACTIVE = 9  # channels

log = logging.getLogger(__name__)


def triton_works(x: Tensor) -> bool:
    """Whether kernels can compute with tensors of this device and type. The first answer waits for the device."""
    if x.dtype not in TOLERANCE or not triton_runs(x):
        return False
    if not x.is_cuda or isinstance(x, torch._subclasses.FakeTensor) or torch.cuda.is_current_stream_capturing():
        return True
    return _tried(x.device, x.dtype)


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            error = _largest_error(device, dtype)
    except Exception as reason:  # whatever a compiler or a driver may say
        problem = str(reason).strip().partition("\n")[0] or type(reason).__name__
    else:
        if error < TOLERANCE[dtype]:
            return True
        problem = f"their numbers are wrong by {error:.1e}"
    log.warning("Triton kernels do not work on this device in %s, and PyTorch's take their place: %s", dtype, problem)
    return False


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """Of what the kernels compute for a small layer, relative to the largest value of each tensor."""
    ours, theirs = _by_kernels(device, dtype), _by_pytorch(dtype)
    errors = [(one.cpu().double() - other).abs().max() / other.abs().max() for one, other in zip(ours, theirs)]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())


def _inputs(dtype: torch.dtype) -> list[Tensor]:
    """x, the norm's weight and bias, W1, W2 and b of the gates, and the gates' gradient. Not random: a run has its own
    numbers, which nobody else may use up."""
    shapes = (3, 24, 5, 5), (24,), (24,), (2, 3, 24), (2, 24, 3), (2, 24), (3, 2, 24)
    numbers = [  # whatever the default type and device are
        torch.arange(1, 1 + math.prod(shape), dtype=torch.float32, device="cpu").view(shape) for shape in shapes
    ]
    waves = [torch.sin((7 + i) * number) for i, number in enumerate(numbers)]
    waves[0] = waves[0].to(dtype).contiguous(memory_format=torch.channels_last)
    waves[1], waves[5] = 1 + 0.5 * waves[1], 1 + waves[5]
    return waves


def _by_pytorch(dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias, squeeze, excite, gate_bias, upstream = _inputs(dtype)
    x = x.float().requires_grad_()
    with torch.enable_grad():
        u = F.relu(F.batch_norm(x, None, None, weight, bias, training=True))
        gates = drop_smallest(head_gates(pool(u), squeeze, excite, gate_bias), torch.tensor(INACTIVE, device="cpu"))
        (dx,) = torch.autograd.grad((gates * upstream).sum(), x)
    u, gates = u.detach(), gates.detach()
    return [gates, dx, u * gates.transpose(0, 1)[..., None, None]]


def _by_kernels(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    from .backends import triton_layer as layer
    from .backends import triton_passes as passes

    x, weight, bias, *weights, upstream = (part.to(device) for part in _inputs(dtype))
    running = torch.zeros_like(weight), torch.ones_like(weight)
    norm = layer.Norm(weight, bias, *running, torch.tensor(0, device=device), 0.1, 1e-5, True)
    selected = layer.select(x, layer.Gates(*weights), torch.tensor(INACTIVE, device=device), norm)
    scale, shift = selected.folded[:2]
    scaled = passes.scale(x, Norm(scale, shift), selected.gates)
    # A convolution through which nothing comes back: the gradient of x is the pooled features' alone.
    dx, _, dscale, dshift = passes.combine(x, Norm(scale, shift), selected.gates, list(torch.zeros_like(scaled)))
    back = layer.Upstream(dx, torch.zeros(1, 24, device=device), upstream, dscale, dshift, None)
    dx, *_ = layer.backward(x, torch.zeros(24, device=device), layer.Gates(*weights), norm, selected, back)
    # What else a run needs: evaluation, and images of one pixel.
    layer.select(x, layer.Gates(*weights), torch.tensor(0, device=device), norm._replace(tracked=None, training=False))
    _one_pixel(x[:, :, :1, :1].contiguous(), layer.Gates(*weights))
    return [selected.gates, dx, scaled]


def _one_pixel(x: Tensor, weights: Any) -> None:
    from .backends import triton_layer as layer

    selected = layer.select(x, weights, torch.tensor(INACTIVE, device=x.device), None)
    back = layer.Upstream(x, torch.zeros(1, 24, device=x.device), selected.gates, None, None, selected.penalty)
    layer.backward(x, torch.zeros(24, device=x.device), weights, None, selected, back)
