"""`gated_conv2d`, the operation that a DGC layer rests on, as a PyTorch operator: `torch.ops.dgc_fastai.gated_conv2d`.

`reference` defines it, and the backends must equal it; `selection` says which one runs.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import reference
from .backends import exported, per_sample
from .backends.base import Gradients, Norm
from .conv_desc import Pair, conv_desc
from .dispatch import LIBRARY
from .gates import spread_blocks
from .precision import products_like_convolutions
from .selection import select_backend, uses_reference

__all__ = ["gated_conv2d"]


def gated_conv2d(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Convolve each sample with its input channels scaled by each head's gates; see `reference.gated_conv2d`.

    Backends are given a gate for each channel: those of blocks are spread over their channels here.
    Autograd keeps the arguments and nothing else. Under autocast x and weight are cast, the gates are not. Only the
    reference has second derivatives.
    """
    gates = spread_blocks(gates, weight.shape[1])
    if not torch.jit.is_scripting():
        if uses_reference():
            return reference.gated_conv2d(x, gates, weight, scale, shift, stride, padding, dilation)
        if torch.compiler.is_exporting():  # an exported network should run without this package
            x = x if scale is None or shift is None else reference.apply_norm(x, scale, shift)
            return exported.gated_conv2d(x, gates, weight, stride, padding, dilation)
    return torch.ops.dgc_fastai.gated_conv2d(x, gates, weight, scale, shift, stride, padding, dilation)


_ARGUMENTS = (
    "Tensor x, Tensor gates, Tensor weight, Tensor? scale, Tensor? shift, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
)
LIBRARY.define(f"gated_conv2d({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    f"gated_conv2d_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def forward(
    x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """`gated_conv2d` by the selected backend, below autograd and autocast."""
    desc = conv_desc(x.shape, weight.shape, gates.shape[1], stride, padding, dilation)
    backend = select_backend(desc, x, gates, weight, norm is not None)
    if backend.fuses_norm:
        return backend.forward(desc, x, gates, weight, norm)
    format = per_sample.memory_format(x)  # the result has the same, whatever the backend
    x = x.contiguous(memory_format=format)
    if norm is not None:
        x = reference.apply_norm(x, *norm)
    with products_like_convolutions(x):
        y = backend.forward(desc, x, gates, weight)
    return y.contiguous(memory_format=format)


def backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    norm: Norm | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Gradients:
    """Its gradients, those of gates that are zero anything, and parts of sums as `Gradients` says."""
    desc = conv_desc(x.shape, weight.shape, gates.shape[1], stride, padding, dilation)
    backend = select_backend(desc, x, gates, weight, norm is not None)
    if backend.fuses_norm:
        return backend.backward(desc, grad, x, gates, weight, norm)
    format = per_sample.memory_format(x)
    x = x.contiguous(memory_format=format)
    u = x if norm is None else reference.apply_norm(x, *norm)
    grad = grad.contiguous(memory_format=format)
    with products_like_convolutions(x):
        dx, dgates, dweight, _, _ = backend.backward(desc, grad, u, gates, weight)
    dweight = dweight.contiguous(memory_format=per_sample.memory_format(weight))
    if norm is None:
        return Gradients(dx.contiguous(memory_format=format), dgates, dweight)
    passed = dx * (u > 0)
    dscale = (passed * x).sum((0, 2, 3), dtype=norm.scale.dtype)
    dshift = passed.sum((0, 2, 3), dtype=norm.shift.dtype)
    dx = (passed * norm.scale.reshape(1, -1, 1, 1)).to(x.dtype)
    return Gradients(dx.contiguous(memory_format=format), dgates, dweight, dscale, dshift)


@torch.library.impl(LIBRARY, "gated_conv2d", "CompositeExplicitAutograd")
def _forward(x, gates, weight, scale, shift, *geometry):
    return forward(x, gates, weight, None if scale is None else Norm(scale, shift), *geometry)


@torch.library.impl(LIBRARY, "gated_conv2d_backward", "CompositeExplicitAutograd")
def _backward(grad, x, gates, weight, scale, shift, *geometry):
    gradients = backward(grad, x, gates, weight, None if scale is None else Norm(scale, shift), *geometry)
    dx, dgates, *rest = (gates.new_empty(0) if part is None else part for part in gradients.summed(weight))
    return dx, dgates.masked_fill_(gates == 0, 0), *rest  # of dropped channels; see the definition


@torch.library.register_fake("dgc_fastai::gated_conv2d", lib=LIBRARY)
def _forward_fake(x, gates, weight, scale, shift, *geometry):
    y = x.new_empty(conv_desc(x.shape, weight.shape, gates.shape[1], *geometry).output_shape)
    return y.contiguous(memory_format=per_sample.memory_format(x))


@torch.library.register_fake("dgc_fastai::gated_conv2d_backward", lib=LIBRARY)
def _backward_fake(grad, x, gates, weight, scale, shift, *geometry):
    sizes = [gates.new_empty(0) if part is None else torch.empty_like(part) for part in (scale, shift)]
    dx, dweight = (
        part.new_empty(part.shape).contiguous(memory_format=per_sample.memory_format(part)) for part in (x, weight)
    )
    return dx, gates.new_empty(gates.shape), dweight, *sizes


def _save(ctx, inputs, output):
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    tensors = ctx.saved_tensors
    gradients = torch.ops.dgc_fastai.gated_conv2d_backward(grad, *tensors, ctx.stride, ctx.padding, ctx.dilation)
    return *(None if given is None else part for given, part in zip(tensors, gradients)), None, None, None


torch.library.register_autograd("dgc_fastai::gated_conv2d", _differentiate, setup_context=_save, lib=LIBRARY)


def _refuse(ctx, *grads):
    raise NotImplementedError("gated_conv2d has no second derivative; use_backend('reference') of dgc_fastai.ops has")


torch.library.register_autograd("dgc_fastai::gated_conv2d_backward", _refuse, lib=LIBRARY)


def _autocast(device: str, key: str):
    """The rule for autocast: x and weight are cast to its type; gates and the folded norm stay in float32."""

    def cast_and_call(x, gates, weight, *rest):
        dtype = torch.get_autocast_dtype(device)
        x, weight = (part.to(dtype) if part.dtype != torch.float64 else part for part in (x, weight))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return torch.ops.dgc_fastai.gated_conv2d(x, gates, weight, *rest)

    LIBRARY.impl("gated_conv2d", cast_and_call, key)


_autocast("cpu", "AutocastCPU")
_autocast("cuda", "AutocastCUDA")


def _kept(gates: Tensor) -> float:
    """The share of channels kept; all, where there are only shapes."""
    known = gates.numel() and not gates.is_meta and not isinstance(gates, torch._subclasses.FakeTensor)
    return int((gates != 0).sum()) / gates.numel() if known else 1.0


@register_flop_formula(torch.ops.dgc_fastai.gated_conv2d, get_raw=True)
def _forward_flops(x, gates, weight, *args, out_val=None, **kwargs) -> int:
    """The operations that the kept channels need, whatever backend ran."""
    return round(conv_flop_count(x.shape, weight.shape, out_val.shape) * _kept(gates))


@register_flop_formula(torch.ops.dgc_fastai.gated_conv2d_backward, get_raw=True)
def _backward_flops(grad, x, gates, weight, *args, out_val=None, **kwargs) -> int:
    return round(2 * conv_flop_count(x.shape, weight.shape, grad.shape) * _kept(gates))
