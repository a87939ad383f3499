"""A device "sim" that computes on the CPU and refuses what an accelerator refuses: PyTorch's PrivateUse1, in Python.

Its tensors do not mix with the CPU's, and `waits` notes whatever would make the host wait for an accelerator. Once
started it stays, and the process then has an accelerator: start it in a process of its own.
"""

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

from helpers.counting import DATA_DEPENDENT, has_mask

__all__ = ["start", "values", "waits"]

aten = torch.ops.aten
READS = {aten._local_scalar_dense, *DATA_DEPENDENT}
waits: list[str] = []  # the operators that did: reads of values, and copies from and to the CPU
library = torch.library.Library("_", "IMPL")


def start() -> None:
    backend_registration._setup_privateuseone_for_python_backend("sim")
    library.fallback(_create, "PrivateUse1")
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(1, device="sim")` is made on the CPU, then copied


def values(tensor: Tensor) -> Tensor:
    """What a tensor of the device holds, as one of the CPU on the same memory."""
    assert isinstance(tensor, OnDevice), f"a tensor on {tensor.device}"
    return tensor.raw


def _create(func, *args, **kwargs):
    """Operators that are given a device and no tensor."""
    assert not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))), func
    return OnDevice(func(*args, **{**kwargs, "device": "cpu"}))


class OnDevice(Tensor):
    """A tensor of the device around one of the CPU, `raw`."""

    @staticmethod
    def __new__(cls, raw: Tensor):
        layout = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype)
        tensor = Tensor._make_wrapper_subclass(cls, raw.shape, device="sim:0", **layout)
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        if func._can_decompose():  # some reach this undivided, where autograd does not look at them
            return func.decompose(*args, **kwargs)
        if packet is not aten.copy_:
            _refuse_tensors_of_the_cpu(func, args, kwargs)
        if func.namespace == "dgc_fastai":  # the operator's body, whose operators come here
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        to_cpu = (args[0].device if packet is aten.copy_ else torch.device(kwargs.get("device") or "sim")).type == "cpu"
        copies = to_cpu or (packet is aten.copy_ and args[1].device.type == "cpu")
        masked = packet in (aten.index, aten.index_put, aten.index_put_) and has_mask(args[1])
        if packet in READS or masked or copies:
            waits.append(str(func))
        return _compute(func, args, kwargs, to_cpu)


def _refuse_tensors_of_the_cpu(func, args, kwargs) -> None:
    """But for those of no dimensions that an elementwise operator reads, as on a GPU."""
    arguments = {one.name: one.alias_info for one in func._schema.arguments}
    for name, value in {**dict(zip(arguments, args)), **kwargs}.items():
        reads_numbers = torch.Tag.pointwise in func.tags and not (arguments[name] and arguments[name].is_write)
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and (leaf.dim() or not reads_numbers):
                raise RuntimeError(f"{func}: {name} is on {leaf.device}, other tensors are on sim:0")


def _compute(func, args, kwargs, to_cpu: bool):
    given = {id(one.raw): one for one in tree_leaves((args, kwargs)) if isinstance(one, OnDevice)}
    args, kwargs = tree_map_only(OnDevice, values, (args, kwargs))
    result = func(*args, **{**kwargs, "device": "cpu"} if "device" in kwargs else kwargs)
    for one in given.values():
        assert one.shape == one.raw.shape and one.stride() == one.raw.stride(), f"{func} changes a tensor's form"
    wrap = lambda one: given[id(one)] if id(one) in given else OnDevice(one)  # noqa: E731
    return result if to_cpu else tree_map_only(Tensor, wrap, result)
