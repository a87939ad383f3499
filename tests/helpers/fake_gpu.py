"""A machine that looks as if it had a GPU: `with fake_gpu() as gpu`.

Tensors on its device have shapes, types and strides, and no values (PyTorch's FakeTensor): the operators' real bodies
run, and mixing devices raises. Tensors on the CPU are ordinary. What the host reads from the device is zero, or true.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fastai.torch_core  # noqa: F401  (gives `torch.as_subclass`)
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from helpers.counting import Counts
from helpers.fake_autograd import backward
from helpers.fake_cuda import cuda_functions, nothing

__all__ = ["FakeGpu", "fake_gpu"]

aten = torch.ops.aten


class FakeGpu(TorchDispatchMode):
    """Runs what concerns the device on shapes, the rest on the CPU, and counts the former: see `Counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.counts = Counts()

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Counts of what runs within; they stay valid afterwards."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    def shell(self, tensor: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """A tensor of the same shape, type and strides without values."""
        with self.fakes:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) and tensor.is_cuda for tensor in tensors)
        to = kwargs.get("device")
        to_device = to is not None and torch.device(to).type == "cuda"
        if func.overloadpacket in (aten._pin_memory, aten.pin_memory):
            return args[0].clone()
        if func.namespace == "prim" or not (on_device or to_device):
            return func(*args, **kwargs)
        if func._can_decompose():  # some reach this undivided, where autograd does not look at them
            with self:
                return func.decompose(*args, **kwargs)
        if func.namespace == "dgc_fastai":  # the operator's body, whose operators come here
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func.overloadpacket in (aten._local_scalar_dense, aten.item):
            self.counts.add_sync()
            return _value(args[0].dtype)
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            copied = self._copy(func, args, kwargs, tensors, to)
            if copied is not None:
                return copied
        return self._run(func, args, kwargs)

    def _copy(self, func, args, kwargs, tensors: list[Tensor], to: Any) -> Tensor | None:
        """A copy between host and device, if it is one."""
        source = args[0] if func.overloadpacket is aten._to_copy else args[1]
        target = source.device if to is None else torch.device(to)
        if func.overloadpacket is aten.copy_:
            target = args[0].device
        if source.device.type == target.type:
            return None
        kwargs = dict(kwargs)
        non_blocking = kwargs.pop("non_blocking", False)
        if func.overloadpacket is aten.copy_:
            self.counts.add_copy(source, not (non_blocking or (len(args) > 2 and args[2])))
            return args[0]
        self.counts.add_copy(source, not non_blocking)
        with self.fakes:
            source = source if isinstance(source, FakeTensor) else self.shell(source)
            result = func(source, **kwargs)
        return result if target.type == "cuda" else _constant(result)

    def _run(self, func, args, kwargs):
        """On shapes, and counted."""
        shells = tree_map_only(Tensor, lambda one: one if isinstance(one, FakeTensor) else self.shell(one), args)
        given = shells
        written = [one for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
        if func.overloadpacket is aten.equal:
            result = True
        elif written and not func._schema.returns:  # not all fused optimizers have a rule for shapes
            result = None
        else:
            with self.fakes:
                if func.overloadpacket is aten.nonzero:
                    result = _all_places(shells[0]).T
                else:
                    if func.overloadpacket in (aten.index, aten.index_put_):
                        shells = [shells[0], _without_masks(shells[1]), *shells[2:]]
                    result = func(*shells, **kwargs)
        if func.overloadpacket in (aten.convolution, aten.convolution_backward):
            result = self._as_cudnn_lays_it_out(
                result, shells[:2] if func.overloadpacket is aten.convolution else shells[:3]
            )
        # cuDNN's batch norm clones its reserve where a node's graph is kept, as `fake_autograd` has to.
        if not (func.overloadpacket is aten.clone and result.dtype == torch.uint8):
            self.counts.add(func, given, kwargs, result)
        return result

    def _as_cudnn_lays_it_out(self, result, given: list[Tensor]):
        """The results of a convolution in cuDNN's layout, which PyTorch's rule for shapes does not know without a GPU.

        It is channels-last if the input or the filters are. The other arguments are copied then.
        """
        formats = [suggest_memory_format(one) for one in given]
        last = torch.channels_last if torch.channels_last in formats[-2:] else torch.contiguous_format
        for one in given:
            if not one.is_contiguous(memory_format=last):
                self.counts.add(aten.clone.default, [one], {}, one)
        with self.fakes:
            return tree_map_only(
                Tensor, lambda one: torch.empty_like(one, memory_format=last) if one.dim() == 4 else one, result
            )


def _all_places(mask: Tensor) -> Tensor:
    """Where a mask is true, if it is everywhere: [dimensions, elements]."""
    return torch.empty(mask.dim(), mask.numel(), dtype=torch.int64, device=mask.device)


def _without_masks(indices: list[Tensor | None]) -> list[Tensor | None]:
    """The same indices with numbers for masks."""
    found: list[Tensor | None] = []
    for index in indices:
        found.extend([*_all_places(index)] if index is not None and index.dtype == torch.bool else [index])
    return found


def _value(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def _constant(fake: Tensor) -> Tensor:
    """What a tensor on the device is on the host."""
    fill = _value(fake.dtype)
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype).fill_(fill)


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeGpu]:
    """A machine with one GPU of a compute capability; see above."""
    gpu = FakeGpu()
    generator = torch.Generator
    with ExitStack() as stack:
        for name, function in cuda_functions(gpu, capability).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        stack.callback(setattr, torch.backends.cudnn.conv, "fp32_precision", torch.backends.cudnn.conv.fp32_precision)
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", nothing))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", nothing))
        # fastai's would replace all attributes, among them those that make it a FakeTensor.
        stack.enter_context(mock.patch.object(FakeTensor, "set_meta", nothing, create=True))
        # FakeTensors are weakly referenced by their mode, which does not matter to `Module.to`.
        stack.enter_context(mock.patch.object(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda one: [])))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device="cpu": generator()))
        stack.enter_context(mock.patch.object(torch._C, "_current_graph_task_id", lambda: backward.number))
        stack.enter_context(mock.patch.object(torch, "as_subclass", _as_subclass(torch.as_subclass)))
        stack.enter_context(mock.patch.object(torch.autograd, "backward", backward))
        stack.enter_context(_counted_triton(gpu))
        with gpu.fakes:  # sets the device guard that does nothing
            pass
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(1, device="cuda")` is made here, then copied
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(gpu)
        yield gpu


def _address(tensor: FakeTensor) -> int:
    """Stands for `data_ptr`: the same for views of one storage."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def _as_subclass(original: Callable[[Tensor, type], Tensor]) -> Callable[[Tensor, type], Tensor]:
    """`torch.as_subclass`, by which fastai marks images and classes, for FakeTensors as well, which it refuses."""

    def as_subclass(tensor: Tensor, kind: type) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            return original(tensor, kind.__mro__[kind.__mro__.index(FakeTensor) + 1] if _is_fake(kind) else kind)
        result = tensor.view(tensor.shape)
        result.__class__ = _fake_kind(kind)
        return result

    return as_subclass


def _is_fake(kind: type) -> bool:
    return issubclass(kind, FakeTensor)


@functools.cache
def _fake_kind(kind: type) -> type:
    if issubclass(FakeTensor, kind):
        return FakeTensor
    return kind if _is_fake(kind) else type(f"Fake{kind.__name__}", (FakeTensor, kind), {})


@contextmanager
def _counted_triton(gpu: FakeGpu) -> Iterator[None]:
    """Triton's launches are counted, and do nothing."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return

    def counted(run):
        def launch(kernel, *args, **kwargs):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            devices = {tensor.device.type for tensor in tensors}
            if devices == {"cpu"}:
                return run(kernel, *args, **kwargs)
            assert devices == {"cuda"}, f"{kernel.__name__} was given tensors on {devices}"
            return gpu.counts.add_triton(kernel.__name__, tensors)

        return launch

    with ExitStack() as stack:
        for kind in (InterpretedFunction, JITFunction):
            stack.enter_context(mock.patch.object(kind, "run", counted(kind.run)))
        yield
