"""What `deploy` changes in a network, one duty each: normalization layers, ReLUs, residuals and pooling are folded into
convolutions, and concatenations are made in place."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.fx import Node
from torch.nn.modules.utils import _pair
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers.group_conv import GroupConv2d
from ..ops.dense import MAX_STEM_CHANNELS
from . import concat
from .graph import CONVOLUTIONS, NORMS, Network, Part, replace_module
from .modules import DeployedConv2d, DeployedGroupConv2d, DeployedStem

__all__ = ["concatenate_in_place", "fold_norms", "fold_pooling", "fold_relus", "fold_residuals", "is_zero_padded"]

PLAIN = nn.Conv2d, GroupConv2d


def fold_norms(network: Network) -> None:
    """Fold each batch norm into the convolution before it, if nothing else reads what is between them."""
    norms = set(network.calls(*NORMS))
    for node in network.calls(DeployedConv2d, *PLAIN):
        reader = network.reader(node)
        if reader not in norms or network.module(reader).running_mean is None:
            continue
        conv, norm = network.module(node), network.module(reader)
        if isinstance(conv, DeployedConv2d):
            conv.fold_norm(norm)
        else:
            replace_module(network.root, conv, fuse_conv_bn_eval(conv, norm))
        rest: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d):  # timm's, with an activation of its own
            rest = norm.act if type(norm.drop) is nn.Identity else nn.Sequential(norm.drop, norm.act)
        replace_module(network.root, norm, rest)


def fold_relus(network: Network) -> None:
    """Fold each ReLU into the DGC layer before it, if nothing else reads what is between them."""
    for node in network.calls(DeployedConv2d):
        relu = network.reader(node)
        if network.is_relu(relu) and network.can_skip(relu):
            network.module(node).relu = True
            network.skip(relu)


def fold_pooling(network: Network) -> None:
    """Make a stem of each convolution of images that a ReLU and the usual max pooling follow."""
    for node in network.calls(*PLAIN):
        conv, relu = network.module(node), network.reader(node)
        if conv.groups > 1 or conv.in_channels > MAX_STEM_CHANNELS or not is_zero_padded(conv):
            continue
        pool = network.reader(relu) if network.is_relu(relu) else None
        if relu is not None and network.is_call(pool, nn.MaxPool2d) and _is_usual(network.module(pool)):
            if network.can_skip(relu) and network.can_skip(pool):
                replace_module(network.root, conv, DeployedStem(conv))
                network.skip(relu)
                network.skip(pool)


def is_zero_padded(conv: nn.Conv2d) -> bool:
    """Whether a convolution pads by so many zeros on each side."""
    return isinstance(conv.padding, tuple) and conv.padding_mode == "zeros"


def _is_usual(pool: nn.MaxPool2d) -> bool:
    sizes = [_pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    return sizes == [(3, 3), (2, 2), (1, 1), (1, 1)] and not (pool.ceil_mode or pool.return_indices)


def fold_residuals(network: Network) -> None:
    """Let a DGC layer add the other branch of a residual block, if a ReLU follows the addition."""
    layers = set(network.calls(DeployedConv2d))
    for add in list(network.graph.nodes):
        relu = network.reader(add) if _is_addition(add) else None
        if not network.is_relu(relu):
            continue
        branches = [(add.args[0], add.args[1])]
        if add.target in (operator.add, torch.add):  # in-place ones change their first argument
            branches.append((add.args[1], add.args[0]))
        for branch, shortcut in branches:
            node = network.source(branch)
            part = network.part(node, add, relu)
            if part and node in layers and network.reader(node) is add and _can_wait(network, node, relu):
                if not network.module(node).relu:
                    fused = network.insert(part, relu, "call_module", node.target, node.args[0], shortcut)
                    network.replace(relu, fused)
                    break


def _is_addition(node: Node) -> bool:
    is_function = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    two = len(node.args) == 2 and all(isinstance(arg, Node) for arg in node.args) and not node.kwargs
    return two and (is_function or is_method)


def _can_wait(network: Network, node: Node, until: Node) -> bool:
    """Whether a node can be called as late as another, because nothing between them changes what it reads."""
    nodes = list(network.graph.nodes)
    between = nodes[nodes.index(node) + 1 : nodes.index(until)]
    made = set()
    for other in between:
        if network.is_fresh(other):
            made.add(other)
        elif network.is_relu(other) or _is_addition(other):  # perhaps in place
            if not {network.source(arg) for arg in other.args[:1]} <= made | {node}:
                return False
            made.add(other)
        elif not network.is_identity(other):
            return False
    return True


@dataclass
class _Chain:
    """Concatenations, each of which repeats the one before and appends to it."""

    arguments: list[Node]
    """What is concatenated in all, as the concatenations read it."""
    sources: list[Node]
    """The same, before any identities."""
    cats: list[tuple[Node, int]]
    """Each concatenation, and how many of the arguments it has."""


def concatenate_in_place(network: Network) -> None:
    """Let the convolutions of a dense block write into one tensor, so that nothing is concatenated."""
    for chain in _find_chains(network):
        part = network.part(*(cat for cat, _ in chain.cats))
        channels = [_channels(network, node) for node in chain.sources[1:]]
        known = [count for count in channels if count is not None]
        if part and len(chain.cats) > 1 and len(known) == len(channels) and _can_share(network, chain):
            _write_in_place(network, part, chain, sum(known))


def _concatenated(node: Node) -> list[Node] | None:
    """The arguments of a concatenation of channels."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return None
    arguments: list[Any] = [*node.args, *node.kwargs.values()]
    tensors, *dim = arguments
    nodes = isinstance(tensors, (list, tuple)) and all(isinstance(tensor, Node) for tensor in tensors)
    return list(tensors) if nodes and dim == [1] else None


def _find_chains(network: Network) -> list[_Chain]:
    chains: list[_Chain] = []
    known: dict[Node, tuple[list[Node], list[Node]]] = {}
    for node in network.graph.nodes:
        tensors = _concatenated(node)
        if tensors is None:
            continue
        arguments: list[Node] = []
        sources: list[Node] = []
        for tensor in tensors:
            source = network.source(tensor)
            more = known.get(source, ([tensor], [source]))
            arguments, sources = arguments + more[0], sources + more[1]
        known[node] = arguments, sources
        for chain in chains:
            length = len(chain.sources)
            if length < len(sources) and chain.sources == sources[:length]:
                chain.arguments += arguments[length:]
                chain.sources += sources[length:]
                break
        else:
            chain = _Chain(list(arguments), list(sources), [])
            chains.append(chain)
        chain.cats.append((node, len(sources)))
    return chains


def _channels(network: Network, node: Node) -> int | None:
    """How many channels a value has, if a convolution tells."""
    node = network.source(node)
    module = network.module(node)
    if isinstance(module, CONVOLUTIONS):
        return network.module(node).weight.shape[0]
    if isinstance(module, NORMS) or network.is_relu(node):
        return _channels(network, node.all_input_nodes[0])
    return None


def _can_share(network: Network, chain: _Chain) -> bool:
    """Whether nobody notices that all values of a chain lie in one tensor."""
    cats = {cat for cat, _ in chain.cats}
    last = chain.cats[-1][0]
    before = set(list(network.graph.nodes)[: list(network.graph.nodes).index(last)]) | {last}
    if any(not network.readers(source) <= cats for source in chain.sources[1:]):
        return False
    for value in {chain.sources[0], *cats} - {last}:
        for reader in network.readers(value) - cats:
            if not network.is_fresh(reader) or (value in cats and reader not in before):
                return False
    return True


def _write_in_place(network: Network, part: Part, chain: _Chain, added: int) -> None:
    order = {node: place for place, node in enumerate(network.graph.nodes)}
    writers = set(network.calls(DeployedGroupConv2d))
    value, buffer, done, place = chain.arguments[0], None, 1, order[chain.arguments[0]]
    for cat, count in chain.cats:
        for argument, source in zip(chain.arguments[done:count], chain.sources[done:count]):
            is_writer = source in writers and order[source] > place and part.path in source.meta["parents"]
            at = source if is_writer else cat
            if buffer is None:
                buffer = network.insert(part, at, "call_function", concat.start, value, added)
            if is_writer:
                conv = network.insert(part, at, "get_attr", source.target)
                arguments: tuple[Any, ...] = concat.append_result, buffer, conv, source.args[0]
            else:
                arguments = concat.append, buffer, argument
            value, place = network.insert(part, at, "call_function", *arguments), order[at]
            for node in (buffer, value):
                node.meta["is_wrapped"] = True  # so that tracers take it as one step, and pickle can restore it
        done = max(done, count)
        network.replace(cat, value)
