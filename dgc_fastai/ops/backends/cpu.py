"""`gated_conv2d` by the C++ kernel, which computes with kept channels only and reads them where they are; see csrc/."""

import torch
from torch import Tensor

from .. import kernel, structures
from ..conv_desc import ConvDesc, conv_desc
from ..packed_layer import pack_weight
from . import per_sample
from .base import Backend, Gradients, Norm

__all__ = ["Cpu", "group_conv2d", "group_conv2d_backward", "is_supported"]


class Cpu(Backend):
    name = "cpu"

    def is_supported(self, desc: ConvDesc, x: Tensor, weight: Tensor) -> bool:
        return is_supported(x, weight) and not per_sample.is_channels_last(x)

    def forward(self, desc: ConvDesc, x: Tensor, gates: Tensor, weight: Tensor, norm: Norm | None = None) -> Tensor:
        gates = gates.to(kernel.acc_dtype(x.dtype)).contiguous()
        return _forward("gated_conv2d", desc, x, pack_weight(weight, desc.heads), gates)

    def backward(
        self,
        desc: ConvDesc,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        norm: Norm | None = None,
    ) -> Gradients:
        if x.dtype == torch.bfloat16:  # many values are summed in place, and read as often
            found = self.backward(desc, grad.float(), x.float(), gates, weight.float())
            return Gradients(found.x.to(x.dtype), found.gates, found.weight.to(weight.dtype))
        grad, values = grad.contiguous(), gates.to(kernel.acc_dtype(x.dtype)).contiguous()
        backward = _backward_pointwise if desc.is_pointwise else _backward
        dx, dgates, dweight = backward(desc, grad, x, values, weight)
        assert dgates is not None
        return Gradients(dx, dgates.to(gates.dtype), dweight)


def is_supported(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is available and made for tensors of these types, once x is contiguous."""
    return (
        x.device.type == "cpu" and x.dtype in kernel.TYPES and weight.dtype == x.dtype and kernel.library() is not None
    )


def group_conv2d(desc: ConvDesc, x: Tensor, weight: Tensor) -> Tensor:
    """An ordinary group convolution of contiguous x [B, C, H, W] with weight [O, C / groups, kh, kw]."""
    return _forward("group_conv2d", desc, x, pack_weight(weight, desc.heads, grouped=True))


def group_conv2d_backward(desc: ConvDesc, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    dx, _, dweight = _backward(desc, grad.contiguous(), x, None, weight)
    return dx, dweight


def _forward(name: str, desc: ConvDesc, x: Tensor, packed: Tensor, gates: Tensor | None = None) -> Tensor:
    y = x.new_empty(desc.output_shape)
    args = structures.ForwardArgs(
        x=x.data_ptr(), x_stride=x.stride(0), gates=_address(gates), y=y.data_ptr(), y_stride=y.stride(0)
    )
    kernel.function(name, x.dtype)(desc.struct, structures.PackedLayer(weight=packed.data_ptr()), args)
    return y


def _backward(
    desc: ConvDesc, grad: Tensor, x: Tensor, gates: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients for filters of any size; without gates, of a group convolution."""
    packed = pack_weight(weight, desc.heads, desc.grouped)
    dx, dgates = torch.zeros_like(x), None if gates is None else torch.zeros_like(gates)
    dweight = weight.new_empty(weight.shape)
    args = structures.BackwardArgs(
        grad_y=grad.data_ptr(),
        x=x.data_ptr(),
        gates=_address(gates),
        grad_x=dx.data_ptr(),
        grad_gates=_address(dgates),
        grad_weight=dweight.data_ptr(),
    )
    layer = structures.PackedLayer(weight=packed.data_ptr())
    kernel.function("backward_input", x.dtype)(desc.struct, layer, args)
    scratch = x.new_empty(kernel.function("backward_weight_scratch", x.dtype)(desc.struct))
    args.scratch = scratch.data_ptr()
    kernel.function("backward_weight", x.dtype)(desc.struct, layer, args)
    return dx, dgates, dweight


def _backward_pointwise(
    desc: ConvDesc, grad: Tensor, x: Tensor, gates: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for 1x1 filters without padding, from the pixels that the filters read."""
    packed, dgates = pack_weight(weight, desc.heads), torch.zeros_like(gates)
    read = per_sample.strided_pixels(x, desc.stride)
    dread = torch.empty_like(read)
    partial = packed.new_zeros(torch.get_num_threads(), desc.heads, desc.channels, desc.filters)
    args = structures.BackwardArgs(
        grad_y=grad.data_ptr(),
        x=read.data_ptr(),
        gates=gates.data_ptr(),
        grad_x=dread.data_ptr(),
        grad_gates=dgates.data_ptr(),
        scratch=partial.data_ptr(),
    )
    without_stride = conv_desc(read.shape, weight.shape, desc.heads, (1, 1), (0, 0), (1, 1))
    layer = structures.PackedLayer(weight=packed.data_ptr())
    kernel.function("backward_pointwise", x.dtype)(without_stride.struct, layer, args)
    dweight = partial.sum(0).permute(2, 0, 1).reshape(weight.shape)
    if read is x:
        return dread, dgates, dweight
    dx = torch.zeros_like(x)
    dx[:, :, :: desc.stride[0], :: desc.stride[1]] = dread
    return dx, dgates, dweight


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
