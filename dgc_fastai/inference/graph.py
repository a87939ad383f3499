"""A network as a graph of `torch.fx`, with what the passes of `deploy` ask of it and how it becomes modules again.

The modules of a network stay, each with its class, its methods and its name, so that weights keep their names. A pass
changes a module where it stands, or the order of operations in the forward of one of its parents. Only the latter
becomes a `torch.fx.GraphModule`.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch.fx import Node

from ..layers.group_conv import GroupConv2d
from .modules import DeployedConv2d, DeployedGroupConv2d, is_plain

__all__ = ["Network", "Part", "replace_module"]


NORMS = nn.BatchNorm2d, BatchNormAct2d
CONVOLUTIONS = DeployedConv2d, DeployedGroupConv2d, nn.Conv2d, GroupConv2d
# What certainly returns a tensor of its own, and changes none of its arguments.
FRESH_MODULES = (*CONVOLUTIONS, *NORMS, nn.AvgPool2d, nn.MaxPool2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid)
FRESH_FUNCTIONS = operator.add, operator.mul, torch.add, torch.mul, torch.cat


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under each of its names."""
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if module is old:
            root.set_submodule(name, new)


def enter(x: Any, path: str) -> Any:
    """In a graph: here begins the forward of the module of that name."""
    return x


def leave(x: Any, path: str) -> Any:
    """In a graph: here ends the forward of the module of that name."""
    return x


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; `torch.fx` makes `x = x + y` of it, which other names of x would not see."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Leaves convolutions, normalization layers and the layers of torch.nn whole, and marks where others begin and end.

    A node's `meta["parents"]` are the names of the modules in whose forward it is, the outermost first.
    """

    LEAVES = (*CONVOLUTIONS, *NORMS, nn.modules.batchnorm._BatchNorm)

    def __init__(self) -> None:
        super().__init__()
        self.parents: list[str] = []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, self.LEAVES) or super().is_leaf_module(module, name)

    def proxy(self, node: Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta["parents"] = tuple(self.parents)
        return node

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(module)
        if self.is_leaf_module(module, path):
            return super().call_module(module, forward, args, kwargs)
        if len(args) != 1 or not isinstance(args[0], fx.Proxy) or kwargs:
            return super().call_module(module, forward, args, kwargs)
        self.parents.append(path)
        x = self.create_proxy("call_function", enter, (args[0], path), {})
        y = super().call_module(module, forward, (x,), kwargs)
        if isinstance(y, fx.Proxy):
            y = self.create_proxy("call_function", leave, (y, path), {})
        self.parents.pop()
        return y


@dataclass
class Part:
    """A module that takes one tensor and returns one, so that its forward can be written anew from the graph."""

    path: str
    first: Node
    last: Node


@dataclass
class Network:
    """A traced network. `root` has it as its only child, so that the network itself can be replaced, too."""

    root: nn.Sequential
    graph: fx.Graph
    parts: dict[str, Part] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    """Names of the parts whose forward is to be written anew."""

    @classmethod
    def trace(cls, root: nn.Sequential) -> "Network":
        """Raises: whatever a forward raises that cannot be traced."""
        network = cls(root, _Tracer().trace(root))
        network._find_parts()
        return network

    # Questions

    def module(self, node: Node | None) -> Any:
        """The module that a node calls, or None."""
        return self.root.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None

    def calls(self, *kinds: type) -> list[Node]:
        """The nodes that call a module of one of these kinds, without hooks, which is called nowhere else."""
        count = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        return [node for node in self.graph.nodes if count[node.target] == 1 and self.is_call(node, *kinds)]

    def is_call(self, node: Node | None, *kinds: type) -> TypeGuard[Node]:
        """Whether a node calls a module of one of these kinds, without hooks, with one tensor."""
        module = self.module(node)
        return node is not None and module is not None and is_plain(module, *kinds) and _is_unary(node)

    def is_relu(self, node: Node | None) -> TypeGuard[Node]:
        if node is None or node.op == "call_module":
            return self.is_call(node, nn.ReLU)
        if not node.args or not isinstance(node.args[0], Node):
            return False
        is_function = node.op == "call_function" and node.target in (F.relu, F.relu_, torch.relu, torch.relu_)
        return is_function or (node.op == "call_method" and node.target in ("relu", "relu_"))

    def is_identity(self, node: Node) -> bool:
        return node.target in (enter, leave) or self.is_call(node, nn.Identity)

    def source(self, node: Node) -> Node:
        """The node that computes a value, before any identities."""
        while self.is_identity(node):
            node = node.all_input_nodes[0]
        return node

    def reader(self, node: Node) -> Node | None:
        """The only node that reads a value, behind any identities; None if there are several."""
        readers = self.readers(node)
        return readers.pop() if len(readers) == 1 else None

    def readers(self, node: Node) -> set[Node]:
        """The nodes that read a value, behind any identities."""
        readers: set[Node] = set()
        for user in node.users:
            readers |= self.readers(user) if self.is_identity(user) else {user}
        return readers

    def is_fresh(self, node: Node) -> bool:
        """Whether the result of a node is certainly a tensor of its own, and none of its arguments is changed."""
        if node.op == "call_module":
            module = self.module(node)
            return isinstance(module, FRESH_MODULES) and not getattr(module, "inplace", False)
        return node.op == "call_function" and node.target in FRESH_FUNCTIONS and "out" not in node.kwargs

    def part(self, *nodes: Node) -> Part | None:
        """The innermost part that contains all these nodes."""
        for path in reversed(nodes[0].meta["parents"]):
            if path in self.parts and all(path in node.meta["parents"] for node in nodes):
                return self.parts[path]
        return None

    # Changes

    def can_skip(self, node: Node) -> bool:
        """Whether a node can be left out, so that its reader reads what it has read."""
        return self._is_only_call(node) or self.part(node) is not None

    def skip(self, node: Node) -> None:
        """Leave a node out."""
        if self._is_only_call(node):
            replace_module(self.root, self.module(node), nn.Identity())
            return
        part = self.part(node)
        assert part is not None, "can_skip says so"
        self.changed.add(part.path)
        node.replace_all_uses_with(node.all_input_nodes[0])
        self.graph.erase_node(node)

    def insert(self, part: Part, before: Node, kind: str, target: Any, *args: Any) -> Node:
        """A new node of a part, whose forward is then written anew."""
        self.changed.add(part.path)
        with self.graph.inserting_before(before):
            node = self.graph.create_node(kind, target, args)
        parents = before.meta["parents"]
        node.meta["parents"] = parents[: parents.index(part.path) + 1]
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let the readers of one node read another, and erase what nobody reads any more."""
        old.replace_all_uses_with(new)
        unread = {old}
        while unread:
            node = unread.pop()
            if node.op == "placeholder" or node.users:
                continue
            if node.target in (enter, leave):
                self.parts.pop(str(node.args[1]), None)
            unread |= set(node.all_input_nodes)
            self.graph.erase_node(node)

    def lower(self) -> None:
        """Make modules of the parts that have changed."""
        for path in self.changed:
            within = any(path != other and path.startswith(f"{other}.") for other in self.changed)
            if not within:
                module = self.root.get_submodule(path)
                replace_module(self.root, module, self._forward_of(self.parts[path], module))

    # Details

    def _is_only_call(self, node: Node) -> bool:
        if node.op != "call_module" or not _is_unary(node) or is_plain(self.module(node)):
            return False
        return sum(other.op == "call_module" and other.target == node.target for other in self.graph.nodes) == 1

    def _find_parts(self) -> None:
        marks: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            if node.target in (enter, leave):
                marks.setdefault(str(node.args[1]), []).append(node)
        for path, nodes in marks.items():
            if [node.target for node in nodes] == [enter, leave]:  # called once, with one result
                part = Part(path, *nodes)
                if self._can_be_rewritten(part):
                    self.parts[path] = part

    def _can_be_rewritten(self, part: Part) -> bool:
        """Whether the graph has all that a module does, and nothing is lost with the class of the module."""
        module = self.root.get_submodule(part.path)
        if part.path == "0" and _attributes(module):
            return False
        if any(child._forward_hooks or child._forward_pre_hooks for child in module.modules() if not _is_leaf(child)):
            return False
        nodes = set(self._nodes(part)) | {part.first, part.last}
        inside = {node for node in self.graph.nodes if part.path in node.meta["parents"]}
        if nodes != inside:  # it reads something else than its argument, or does something whose result nobody reads
            return False
        modules = {id(child) for child in module.modules()}
        for node in nodes - {part.last}:
            if not nodes.issuperset(node.users):
                return False
            if node.op == "call_module" and id(self.module(node)) not in modules:
                return False
            if node.op == "get_attr" and not str(node.target).startswith(f"{part.path}."):
                return False
        return True

    def _nodes(self, part: Part) -> list[Node]:
        """What a part's result is computed by, in order, without its ends."""
        steps = {node for node in self.graph.nodes if node.meta.get("is_wrapped") and part.path in node.meta["parents"]}
        needed, todo = steps, [part.last, *steps]  # to append to a concatenation is needed whoever reads the result
        while todo:
            for node in todo.pop().all_input_nodes:
                if node is not part.first and node not in needed:
                    needed.add(node)
                    todo.append(node)
        return [node for node in self.graph.nodes if node in needed]

    def _forward_of(self, part: Part, module: nn.Module) -> fx.GraphModule:
        names = {id(child): name for name, child in module.named_modules()}
        graph = fx.Graph()
        values = {part.first: graph.placeholder("x")}
        for node in self._nodes(part):
            if self.is_identity(node):
                values[node] = values[node.all_input_nodes[0]]
                continue
            target = node.target
            if node.op == "call_module":
                target = names[id(self.module(node))]
            elif node.op == "get_attr":
                target = str(target).removeprefix(f"{part.path}.")
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = graph.create_node(node.op, target, args, kwargs)
            values[node].meta.update(node.meta)
        graph.output(values[part.last.all_input_nodes[0]])
        rewritten = fx.GraphModule(module, graph, f"Deployed{type(module).__name__}")
        for name, value in vars(module).items():  # such as the number of classes
            if not name.startswith("_") and not hasattr(rewritten, name):
                setattr(rewritten, name, value)
        return rewritten


def _is_unary(node: Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs


def _is_leaf(module: nn.Module) -> bool:
    return _Tracer().is_leaf_module(module, "")


def _attributes(model: nn.Module) -> Iterable[str]:
    """The public methods and other attributes that a class has beside those of every module."""
    names = {name for cls in type(model).__mro__ if cls not in nn.Module.__mro__ for name in vars(cls)}
    return {name for name in names if not name.startswith("_") and not hasattr(nn.Module, name)}
