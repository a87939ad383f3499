"""A machine that looks as if it had a GPU: `with fake_gpu() as gpu`.

Tensors on its device have shapes, types and strides, and no values (PyTorch's FakeTensor): the operators' real bodies
run, and mixing devices raises. Tensors on the CPU are ordinary. What the host reads from the device is zero, or true.
"""

import heapq
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from helpers.counting import Counts

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
        # cuDNN's batch norm clones its reserve where a node's graph is kept, as `_backward` has to.
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


def _backward(roots, gradients=None, retain_graph=None, create_graph=False, inputs=None, **_):
    """`torch.autograd.backward` without PyTorch's engine, which asks CUDA for streams.

    Node by node, the latest first, as the engine does it: it casts and sums gradients to the form of the input, and
    adds up those that meet.
    """
    roots = (roots,) if isinstance(roots, Tensor) else tuple(roots)
    gradients = (gradients,) * len(roots) if gradients is None or isinstance(gradients, Tensor) else gradients
    buffers: dict[Any, list] = {}
    queue: list = []
    numbers = itertools.count()
    waiting: dict[Any, int] = {}

    def give(node, index, gradient):
        slots = buffers.setdefault(node, [None] * len(node._input_metadata))
        if gradient is not None:
            slots[index] = gradient if slots[index] is None else slots[index] + gradient

    def count_edges(nodes):
        seen, stack = set(nodes), list(nodes)
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is not None:
                    waiting[node] = waiting.get(node, 0) + 1
                    if node not in seen:
                        seen.add(node)
                        stack.append(node)

    starts = [root.grad_fn for root in roots]
    count_edges(starts)
    with torch.no_grad():
        for root, gradient in zip(roots, gradients):
            give(root.grad_fn, root.output_nr, torch.ones_like(root) if gradient is None else gradient)
        for node in dict.fromkeys(starts):
            if not waiting.get(node):
                heapq.heappush(queue, (-node._sequence_nr(), next(numbers), node))
        while queue:
            *_, node = heapq.heappop(queue)
            slots = buffers.pop(node)
            if hasattr(node, "variable"):
                _accumulate(node.variable, slots[0])
                continue
            results = _apply(node, slots)
            for (following, index), gradient in zip(node.next_functions, results):
                if following is None:
                    continue
                give(following, index, _formed(gradient, following._input_metadata[index]))
                waiting[following] -= 1
                if not waiting[following]:
                    order = 1 << 62 if hasattr(following, "variable") else following._sequence_nr()
                    heapq.heappush(queue, (-order, next(numbers), following))


def _apply(node, slots) -> tuple:
    if all(slot is None for slot in slots):
        return (None,) * len(node.next_functions)
    call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
    results = call(*slots)
    return results if isinstance(results, tuple) else (results,)


def _formed(gradient: Tensor | None, wanted) -> Tensor | None:
    """A gradient of the shape and type of what it belongs to."""
    if gradient is None:
        return None
    if gradient.shape != torch.Size(wanted.shape):
        gradient = gradient.sum_to_size(wanted.shape)
    assert gradient.device == wanted.device, f"a gradient on {gradient.device} of a tensor on {wanted.device}"
    return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)


def _accumulate(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    assert gradient.device == parameter.device, f"a gradient on {gradient.device} of one on {parameter.device}"
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif all(size == 1 or a == b for size, a, b in zip(gradient.shape, gradient.stride(), parameter.stride())):
        parameter.grad = gradient.detach()
    else:  # gradients are kept in their parameters' layout
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeGpu]:
    """A machine with one GPU of a compute capability; see above."""
    gpu = FakeGpu()
    properties = SimpleNamespace(
        name="a GPU of shapes only",
        major=capability[0],
        minor=capability[1],
        total_memory=80 * 2**30,
        multi_processor_count=132,
    )

    def sync(*args, **kwargs):
        gpu.counts.add_sync()

    def nothing(*args, **kwargs):
        return None

    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "synchronize": sync,
        "empty_cache": nothing,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": nothing,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": nothing,
        "_exchange_device": lambda device: device,
        "_maybe_exchange_device": lambda device: device,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", nothing))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address))
        # FakeTensors are weakly referenced by their mode, which does not matter to `Module.to`.
        stack.enter_context(mock.patch.object(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda one: [])))
        stack.enter_context(mock.patch.object(torch.autograd, "backward", _backward))
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


@contextmanager
def _counted_triton(gpu: FakeGpu) -> Iterator[None]:
    """Triton's launches are counted, and do nothing."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return

    def run(kernel, *args, grid, warmup=False, **kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        assert devices == {"cuda"}, f"{kernel.__name__} was given tensors on {devices}"
        gpu.counts.add_triton(kernel.__name__, tensors)

    with mock.patch.object(InterpretedFunction, "run", run), mock.patch.object(JITFunction, "run", run):
        yield
