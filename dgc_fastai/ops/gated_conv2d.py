"""`gated_conv2d`, the one operation a DGC layer rests on, as a PyTorch operator: `torch.ops.dgc_fastai.gated_conv2d`.

`reference` defines it. The files beside it are formulations of it that must equal it; `choose` says which one runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import reference
from .backends import cpu, exported, gathered, per_sample, scaled_inputs, scaled_weights
from .backends.per_sample import Pair

__all__ = ["FORMULATIONS", "choose", "gated_conv2d", "norm_on_load", "through_dispatcher", "use_formulation"]

FORMULATIONS = ("reference", "scaled_weights", "scaled_inputs", "gathered", "cpu", "triton")

_forced: Optional[str] = None


def gated_conv2d(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Convolve each sample with its input channels scaled by each head's gates; see `reference.gated_conv2d`.

    Autograd keeps the arguments and nothing else. Under autocast x and weight are cast, the gates are not. Only the
    reference has second derivatives.
    """
    if not torch.jit.is_scripting():
        if _forced == "reference":
            return reference.gated_conv2d(x, gates, weight, scale, shift, stride, padding, dilation)
        if torch.compiler.is_exporting():  # an exported network is to need nothing of ours to run
            x = x if scale is None else reference.apply_norm(x, scale, shift)
            return exported.gated_conv2d(x, gates, weight, stride, padding, dilation)
    return torch.ops.dgc_fastai.gated_conv2d(x, gates, weight, scale, shift, stride, padding, dilation)


def forced() -> Optional[str]:
    """The formulation of `use_formulation`, if any."""
    return _forced


def through_dispatcher() -> bool:
    """Whether somebody wants to see an operator; otherwise the dispatcher would take as long as a small layer."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


@contextmanager
def use_formulation(name: Optional[str]) -> Iterator[None]:
    """Within this context, compute every `gated_conv2d` in one way, forward and backward.

    Args:
        name: one of `FORMULATIONS`, or None to `choose`. Layers that the C++ kernel, "cpu", is not made for are
            computed as with None.

    Raises:
        ValueError: there is no such formulation.
    """
    global _forced
    if name is not None and name not in FORMULATIONS:
        raise ValueError(f"no formulation {name!r}; there are {', '.join(FORMULATIONS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def norm_on_load() -> bool:
    """Whether the formulation in use applies norm and ReLU where it reads the input, and so should be given both."""
    return _forced == "triton"


def choose(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    heads: int,
    stride: Pair,
    padding: Pair,
    kept: Optional[int],
    device: str = "cpu",
    compiled: bool = False,
) -> str:
    """The formulation to be expected fastest for these shapes.

    Args:
        x_shape: [B, C, H, W].
        weight_shape: [O, C, kh, kw].
        kept: the largest number of channels that any head keeps, None if to know it would stall the device.
        compiled: whether `cpu.takes` this layer.
    """
    filters, channels, taps = weight_shape[0], weight_shape[1], weight_shape[2] * weight_shape[3]
    area = x_shape[2] * x_shape[3]
    out_area = area // (stride[0] * stride[1])
    pointwise = per_sample.is_pointwise(weight_shape, padding)
    if pointwise:
        area = out_area  # all that is read
    elif device != "cpu":
        # Filters for each sample make a group convolution of as many groups, which cuDNN is slow at.
        return "scaled_inputs"

    # The C++ kernel does nothing for dropped channels, and as many multiplications a second as oneDNN's convolutions.
    # MKL's products, which 1x1 filters amount to, do about twice as many, but know nothing of gates.
    if compiled and (not pointwise or (kept is not None and kept < 0.55 * channels)):
        return "cpu"
    # Gathering saves the multiplications with dropped channels and costs copies. Measured on CPUs, fetching a pixel
    # of a channel and adding its gradient back costs as much as some 32 multiplications, and a filter's value some
    # 32, too, or 64 where oneDNN has to bring it into an order of its own. It should save a fifth to be worth it.
    if kept is not None and (pointwise or (tuple(stride) == (1, 1) and filters // heads % 8 == 0)):
        work = filters // heads * taps
        padded = kept if pointwise else -(-kept // gathered.VECTOR) * gathered.VECTOR
        gathering = padded * (work * (out_area + (32 if pointwise else 64)) + 32 * area)
        if gathering < 0.8 * channels * work * out_area:
            return "gathered"
    # The smaller thing is to be scaled: filters [O, C, kh, kw] or inputs [heads, C, H, W] of each sample.
    return "scaled_weights" if filters * taps < heads * out_area else "scaled_inputs"


_FORMULATION = {"scaled_weights": scaled_weights, "scaled_inputs": scaled_inputs, "gathered": gathered, "cpu": cpu}
_ARGUMENTS = (
    "Tensor x, Tensor gates, Tensor weight, Tensor? scale, Tensor? shift, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
)

_library = torch.library.Library("dgc_fastai", "DEF")
_library.define(f"gated_conv2d({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"gated_conv2d_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _formulation(x: Tensor, gates: Tensor, weight: Tensor, stride: Pair, padding: Pair):
    name = _forced
    compiled = cpu.takes(x, weight)
    if name is None or (name == "cpu" and not compiled):
        kept = gathered.most_kept(gates) if x.device.type == "cpu" else None
        name = choose(x.shape, weight.shape, gates.shape[1], stride, padding, kept, x.device.type, compiled)
    return _FORMULATION[name]


@contextmanager
def _precision_of_convolutions() -> Iterator[None]:
    """A matrix product that stands for a convolution may use TF32 where a convolution may."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = torch.backends.cudnn.conv.fp32_precision
    try:
        yield
    finally:
        products.fp32_precision = before


def _precision(x: Tensor):
    return _precision_of_convolutions() if x.is_cuda and x.dtype == torch.float32 else nullcontext()


@torch.library.impl(_library, "gated_conv2d", "CompositeExplicitAutograd")
def _forward(x, gates, weight, scale, shift, stride, padding, dilation):
    if _forced == "triton":
        from .backends import triton as cuda

        return cuda.forward(x, gates, weight, scale, shift, stride, padding, dilation)
    format = per_sample.memory_format(x)  # results take it, too, whatever the formulation
    x = x.contiguous(memory_format=format)
    if scale is not None:
        x = reference.apply_norm(x, scale, shift)
    with _precision(x):
        y = _formulation(x, gates, weight, stride, padding).forward(x, gates, weight, stride, padding, dilation)
    return y.contiguous(memory_format=format)


@torch.library.impl(_library, "gated_conv2d_backward", "CompositeExplicitAutograd")
def _backward(grad, x, gates, weight, scale, shift, stride, padding, dilation):
    if _forced == "triton":
        from .backends import triton as cuda

        gradients = cuda.backward(grad, x, gates, weight, scale, shift, stride, padding, dilation)
        return *gradients[:3], *(gates.new_empty(0) if part is None else part for part in gradients[3:])
    format = per_sample.memory_format(x)
    x = x.contiguous(memory_format=format)
    u = x if scale is None else reference.apply_norm(x, scale, shift)
    formulation = _formulation(u, gates, weight, stride, padding)
    grad = grad.contiguous(memory_format=format)
    with _precision(x):
        dx, dgates, dweight = formulation.backward(grad, u, gates, weight, stride, padding, dilation)
    dgates = dgates.masked_fill_(gates == 0, 0)  # dropped; see the definition
    if scale is None:
        dscale = dshift = gates.new_empty(0)
    else:
        passed = dx * (u > 0)
        dscale = (passed * x).sum((0, 2, 3), dtype=scale.dtype)
        dshift = passed.sum((0, 2, 3), dtype=shift.dtype)
        dx = (passed * scale.reshape(1, -1, 1, 1)).to(x.dtype)
    return dx.contiguous(memory_format=format), dgates, dweight.contiguous(), dscale, dshift


@torch.library.register_fake("dgc_fastai::gated_conv2d", lib=_library)
def _forward_fake(x, gates, weight, scale, shift, stride, padding, dilation):
    y = x.new_empty(per_sample.output_shape(x.shape, weight.shape, stride, padding, dilation))
    return y.contiguous(memory_format=per_sample.memory_format(x))


@torch.library.register_fake("dgc_fastai::gated_conv2d_backward", lib=_library)
def _backward_fake(grad, x, gates, weight, scale, shift, stride, padding, dilation):
    sizes = [gates.new_empty(0) if part is None else torch.empty_like(part) for part in (scale, shift)]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format).contiguous(
        memory_format=per_sample.memory_format(x)
    )
    return dx, torch.empty_like(gates).contiguous(), weight.new_empty(weight.shape), *sizes


def _save(ctx, inputs, output):
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    tensors = ctx.saved_tensors
    gradients = torch.ops.dgc_fastai.gated_conv2d_backward(grad, *tensors, ctx.stride, ctx.padding, ctx.dilation)
    return *(None if given is None else part for given, part in zip(tensors, gradients)), None, None, None


torch.library.register_autograd("dgc_fastai::gated_conv2d", _differentiate, setup_context=_save, lib=_library)


def _refuse(ctx, *grads):
    raise NotImplementedError("gated_conv2d has no second derivative; dgc_fastai.ops.use_formulation('reference') has")


torch.library.register_autograd("dgc_fastai::gated_conv2d_backward", _refuse, lib=_library)


def _autocast(device: str, key: str):
    """Autocast's rule: x and weight in its type, gates and folded norm in float32."""

    def cast_and_call(x, gates, weight, scale, shift, stride, padding, dilation):
        dtype = torch.get_autocast_dtype(device)
        x, weight = (part.to(dtype) if part.dtype != torch.float64 else part for part in (x, weight))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return torch.ops.dgc_fastai.gated_conv2d(x, gates, weight, scale, shift, stride, padding, dilation)

    _library.impl("gated_conv2d", cast_and_call, key)


_autocast("cpu", "AutocastCPU")
_autocast("cuda", "AutocastCUDA")


def _kept(gates: Tensor) -> float:
    """The share of channels kept; all, where there are only shapes."""
    known = gates.numel() and not gates.is_meta and not isinstance(gates, torch._subclasses.FakeTensor)
    return int((gates != 0).sum()) / gates.numel() if known else 1.0


@register_flop_formula(torch.ops.dgc_fastai.gated_conv2d, get_raw=True)
def _forward_flops(x, gates, weight, scale, shift, stride, padding, dilation, *args, out_val=None, **kwargs) -> int:
    """The operations that the kept channels need, whatever formulation ran."""
    return round(conv_flop_count(x.shape, weight.shape, out_val.shape) * _kept(gates))


@register_flop_formula(torch.ops.dgc_fastai.gated_conv2d_backward, get_raw=True)
def _backward_flops(grad, x, gates, weight, *args, out_val=None, **kwargs) -> int:
    return round(2 * conv_flop_count(x.shape, weight.shape, grad.shape) * _kept(gates))
