"""What a GPU would be asked to do: kernel launches, host synchronizations, copies and bytes, operator by operator.

`FakeGpu` (helpers/fake_gpu.py) calls `Counts.add` for each operator that it sees. In PyTorch's eager mode, one operator
that computes is one launch, a view is none, and a fused or `_foreach_` operator is one. The numbers are comparable with
those of another network, not with a profiler's: a convolution, for instance, is one.

    with fake_gpu() as gpu, use_backend("triton"):
        layer, x = DynamicGroupConv2d(64, 64, 3).to("cuda"), torch.randn(8, 64, 56, 56, device="cuda")
        with gpu.counting() as counts:
            (layer(x).sum() + gate_penalty(layer)).backward()
    print(counts.launches, counts.syncs, counts.bytes, counts.operators, counts.places)
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from helpers import ROOT

__all__ = ["Counts"]

aten = torch.ops.aten

# They return memory or describe it, and launch nothing.
FREE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.lift_fresh,
    aten.is_pinned,
    aten.record_stream,
    aten.set_,
    aten.resize_,
    aten.is_same_size,
}
# The size of the result depends on values, which the host waits for.
DATA_DEPENDENT = {aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.unique_consecutive, aten.equal}
# They overwrite their first argument without reading it.
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_, aten.random_, aten.bernoulli_}


@dataclass
class Counts:
    """Of what has been run since `FakeGpu.counting` began.

    Attributes:
        launches: kernels, among them `triton` ones.
        syncs: where the host waits for the device: reading a value, a copy that is not `non_blocking`, a result whose
            size depends on values.
        copies: tensors copied between host and device.
        bytes: read and written by the launches. An input counts as often as operators read it, whole. Values that a
            tensor repeats, as an expanded one does, count once.
        operators: launches by name.
        operator_bytes: bytes by name.
        places: of the synchronizations, innermost first: file:line of this repository and of fastai.
    """

    launches: int = 0
    triton: int = 0
    syncs: int = 0
    copies: int = 0
    bytes: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    operator_bytes: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def add(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """One operator that has been run on the device."""
        packet = func.overloadpacket
        if packet in FREE or is_view(func):
            return
        if packet in DATA_DEPENDENT or (packet in (aten.index, aten.index_put_) and has_mask(args[1])):
            self.add_sync()
        self._launch(str(packet).removeprefix("aten."), traffic(func, args, kwargs, result))

    def add_copy(self, source: Tensor, blocking: bool) -> None:
        """A copy between host and device."""
        self.copies += 1
        if blocking:
            self.add_sync()

    def add_sync(self) -> None:
        self.syncs += 1
        self.places.append(" < ".join(_callers()))

    def add_triton(self, name: str, tensors: Iterable[Tensor]) -> None:
        """A launch of a Triton kernel, which is assumed to read or write each of its tensors once."""
        self.triton += 1
        self._launch(f"triton.{name}", sum(map(footprint, tensors)))

    def _launch(self, name: str, size: int) -> None:
        self.launches += 1
        self.bytes += size
        self.operators[name] += 1
        self.operator_bytes[name] += size


def is_view(func: Any) -> bool:
    """Whether an operator returns nothing but views of its arguments, by its schema."""
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def has_mask(indices: Iterable[Tensor | None]) -> bool:
    """Whether one of the indices is a mask, whose true elements have to be counted first."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def footprint(tensor: Tensor) -> int:
    """Bytes of the different values of a tensor."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def traffic(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that an operator reads and writes."""
    total, written = 0, []
    for argument, value in zip(func._schema.arguments, [*args, *(None,) * len(func._schema.arguments)]):
        value = kwargs.get(argument.name, value)
        sizes = sum(footprint(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        if argument.alias_info is not None and argument.alias_info.is_write:
            overwrites = argument.is_out or func.overloadpacket in OVERWRITING
            total += sizes if overwrites else 2 * sizes
            written.extend(map(id, tree_leaves(value)))
        else:
            total += sizes
    results = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in written)
    return total + sum(map(footprint, results))


def _callers() -> list[str]:
    """Where the program is, innermost first, without the tests' helpers and torch."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        for prefix in (f"{ROOT}/dgc_fastai/", "/fastai/"):
            if prefix in name:
                place = name[name.index(prefix) + (len(str(ROOT)) if prefix.startswith(str(ROOT)) else 0) :]
                found.append(f"{place.lstrip('/')}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return found
