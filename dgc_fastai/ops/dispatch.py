"""The operators of this package, `torch.ops.dgc_fastai`, and the way to those that compute one layer in inference."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backends import per_sample
from .conv_desc import ConvDesc
from .packed_layer import PackedLayer

__all__ = ["LIBRARY", "LayerOperator", "through_dispatcher"]

LIBRARY = torch.library.Library("dgc_fastai", "DEF")


def through_dispatcher(device: str = "cpu") -> bool:
    """Whether something wants to see the operator rather than its result: a tracer, a mode, or autocast on this type of
    device. Otherwise PyTorch's dispatcher, which takes as long as a small layer, is bypassed."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled(device)
    )


class LayerOperator:
    """A layer in inference by one function of the C++ kernel: `operator(x, layer)` of x [B, C, H, W] and a PackedLayer.

    The function runs where it can. Where autograd or an export needs operators of PyTorch, and where the kernel does
    not support the layer, the definition takes its place. All else that wants to see an operator, such as
    torch.compile, sees `torch.ops.dgc_fastai.<name>`, which does the same. Autocast casts x, and the layer follows.

    Args:
        name: of the operator and of the function.
        definition: computes a layer in operators of PyTorch.
        exported: the same for exports, if there is a faster way.
        output_shape: of the result, from the geometry of the convolution.
        flops: the operations of a layer, from its geometry and parameters.
    """

    def __init__(
        self,
        name: str,
        definition: Callable[[Tensor, PackedLayer], Tensor],
        exported: Callable[[Tensor, PackedLayer], Tensor] | None = None,
        output_shape: Callable[[ConvDesc], tuple] = lambda desc: desc.output_shape,
        flops: Callable[[ConvDesc, PackedLayer], int] = lambda desc, layer: conv_flops(desc),
    ):
        self.name, self.definition, self.exported = name, definition, exported or definition
        self.output_shape = output_shape
        LIBRARY.define(f"{name}(Tensor x, {PackedLayer.SCHEMA}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, lambda x, *flat: self.run(x, PackedLayer.from_flat(*flat)), "CompositeExplicitAutograd")
        self.operator = getattr(torch.ops.dgc_fastai, name)

        @torch.library.register_fake(f"dgc_fastai::{name}", lib=LIBRARY)
        def fake(x, *flat):
            layer = PackedLayer.from_flat(*flat)
            y = x.new_empty(output_shape(layer.desc(x.shape)))
            return y if layer.is_packed else y.contiguous(memory_format=per_sample.memory_format(x))

        @register_flop_formula(self.operator, get_raw=True)
        def count(x, *flat, out_val=None):
            layer = PackedLayer.from_flat(*flat)
            return flops(layer.desc(x.shape), layer)

        self._cast_under_autocast("cpu", "AutocastCPU")
        self._cast_under_autocast("cuda", "AutocastCUDA")

    def __call__(
        self, x: Tensor, layer: PackedLayer, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The layer, or with `residual` the ReLU of its sum with it, into `out`, if given."""
        if torch.compiler.is_exporting():
            y = self.exported(x, layer)
        elif torch.is_grad_enabled() and x.requires_grad:
            y = self.definition(x, layer)
        elif through_dispatcher(x.device.type):
            y = self.operator(x, *layer.flat)
        else:
            return self.run(x, layer, residual, out)
        return _finish(y, residual, out)

    def run(self, x: Tensor, layer: PackedLayer, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The same by the kernel if it supports the layer, otherwise by the definition."""
        if layer.is_packed and per_sample.is_channels_last(x):
            x = x.contiguous()
        if not layer.is_supported(x) or min((desc := layer.desc(x.shape)).out_size) < 1:  # PyTorch has the words
            return _finish(self.definition(x, layer), residual, out)
        y = x.new_empty(self.output_shape(desc)) if out is None else out
        if residual is None:
            return layer.run(self.name, desc, x, y)
        if residual.shape != y.shape:  # the kernel does not broadcast
            return _finish(layer.run(self.name, desc, x, y), residual, out)
        return layer.run(self.name, desc, x, y, residual.to(x.dtype).contiguous())

    def _cast_under_autocast(self, device: str, key: str) -> None:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(x, *flat):
            if x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.operator(x, *flat)

        LIBRARY.impl(self.name, cast_and_call, key)


def conv_flops(desc: ConvDesc) -> int:
    """Floating-point operations of a convolution: two for each multiplication."""
    taps = desc.kernel_size[0] * desc.kernel_size[1]
    return 2 * desc.batch * desc.heads * desc.filters * desc.out_size[0] * desc.out_size[1] * desc.channels * taps


def _finish(y: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
    if residual is not None:
        y = F.relu(y + residual.to(y.dtype))
    return y if out is None else out.copy_(y)
