"""Networks for inference: DGC layers in one call each, norms folded into the convolutions before them."""

import copy
import logging

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.nn.modules.utils import _pair
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..layers.group_conv import GroupConv2d
from ..models.dgc_densenet import DenseStage
from ..ops.dense import STEM_CHANNELS
from .modules import DeployedBlock, DeployedConv2d, DeployedGroupConv2d, DeployedStage, DeployedStem, is_plain

__all__ = ["deploy"]

CONVOLUTIONS = nn.Conv2d, GroupConv2d

_logger = logging.getLogger(__name__)


def deploy(model: nn.Module) -> nn.Module:
    """A frozen copy of a network, for inference: the same numbers in less time.

    Its DGC layers are one call each, into the C++ kernel on a CPU. Batch norms after convolutions, and ReLUs after DGC
    layers, are folded into them where the network is such that `torch.fx` can tell that nothing else reads what lies
    between. The channels that are inactive stay as many as they are.

    The copy takes and returns what the network does, works under `torch.compile` and `torch.export`, and is saved and
    loaded as any module, by `safetensors.torch.save_model` and `load_model`, the latter into a `deploy(model)` of the
    same network. Gradients reach its input, but its weights are no parameters of training any more.

    Args:
        model: any module, such as one of `timm.create_model` or `convert`. Left as it is.

    Returns:
        A module of the same class in evaluation mode.
    """
    root = nn.Sequential(copy.deepcopy(model).eval().requires_grad_(False))  # a layer can be deployed by itself, too
    followers = _followers(root)
    for name, module in list(root.named_modules()):
        if isinstance(module, DynamicGroupConv2d) and _has_statistics(module.norm):
            root.set_submodule(name, DeployedConv2d(module))
    for name, module in list(root.named_modules()):
        if isinstance(module, DeployedConv2d) or is_plain(module, *CONVOLUTIONS):
            _fold_followers(root, name, followers)
    for name, module in list(root.named_modules()):
        if is_plain(module, *CONVOLUTIONS):
            _fold_pooling(root, name, followers)
    for name, module in list(root.named_modules()):
        if isinstance(module, DenseStage):
            root.set_submodule(name, DeployedStage(module))
        elif DeployedBlock.takes(module):
            root.set_submodule(name, DeployedBlock(module))
    for name, module in list(root.named_modules()):
        if not is_plain(module, *CONVOLUTIONS):
            continue
        if module.groups == 1:
            # oneDNN's convolutions and PyTorch's pooling are faster so, from the first image on.
            module.to(memory_format=torch.channels_last)
        elif module.groups < module.in_channels and _is_padded_by_zeros(module):
            root.set_submodule(name, DeployedGroupConv2d(module))
    for module in root.modules():
        if isinstance(module, (DeployedConv2d, DeployedGroupConv2d)):  # stems are the latter, too
            module.repack()
    return root[0]


def _has_statistics(norm: nn.Module) -> bool:
    """Whether a layer's norm is one to be folded; `nn.Identity` is that of a layer without."""
    batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    return batch_norm or type(norm) is nn.Identity


def _is_padded_by_zeros(conv: nn.Conv2d) -> bool:
    return isinstance(conv.padding, tuple) and conv.padding_mode == "zeros"


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kinds = DynamicGroupConv2d, GroupConv2d, BatchNormAct2d, nn.modules.batchnorm._BatchNorm
        return isinstance(module, kinds) or super().is_leaf_module(module, name)


def _followers(root: nn.Sequential) -> dict[str, str]:
    """For each module that is called once: the one that reads its output, where nothing else does."""
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # whatever a forward that is no graph may raise
        _logger.info("No norms are folded: %s is not traceable (%s)", type(root[0]).__name__, error)
        return {}
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    once = {name for name in calls if calls.count(name) == 1}
    return {
        node.target: reader.target
        for node in graph.nodes
        if node.op == "call_module" and node.target in once and len(node.users) == 1
        for reader in node.users
        if reader.op == "call_module" and reader.target in once and reader.args == (node,) and not reader.kwargs
    }


def _fold_followers(model: nn.Module, name: str, followers: dict[str, str]) -> None:
    """Take the batch norm after a convolution into it, and into a DGC layer the ReLU, too."""
    place, normed = name, False
    while name in followers:
        name = followers[name]
        conv, reader = model.get_submodule(place), model.get_submodule(name)
        gated = isinstance(conv, DeployedConv2d)
        if is_plain(reader, nn.Identity):
            continue
        rest = nn.Identity()
        norm = is_plain(reader, nn.BatchNorm2d) or is_plain(reader, BatchNormAct2d)
        if norm and not normed and reader.running_mean is not None:
            if gated:
                conv.fold_norm(reader)
            else:
                model.set_submodule(place, fuse_conv_bn_eval(conv, reader))
            normed = True
            if type(reader) is BatchNormAct2d:  # timm's, with an activation of its own
                rest = reader.act if type(reader.drop) is nn.Identity else nn.Sequential(reader.drop, reader.act)
        elif is_plain(reader, nn.ReLU) and gated:
            rest = reader
        else:
            return
        if is_plain(rest, nn.ReLU) and gated:
            conv.rectify = True
            model.set_submodule(name, nn.Identity())
            return
        model.set_submodule(name, rest)
        if type(rest) is not nn.Identity:
            return


def _fold_pooling(model: nn.Module, name: str, followers: dict[str, str]) -> None:
    """Make a stem of a convolution of images if what follows is a ReLU and then the usual pooling."""
    place, conv, readers = name, model.get_submodule(name), []
    while name in followers:
        name = followers[name]
        reader = model.get_submodule(name)
        if not is_plain(reader, nn.Identity):
            readers.append((name, reader))
    if len(readers) < 2 or not (is_plain(readers[0][1], nn.ReLU) and is_plain(readers[1][1], nn.MaxPool2d)):
        return
    pool = readers[1][1]
    sizes = [_pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    usual = sizes == [(3, 3), (2, 2), (1, 1), (1, 1)] and not (pool.ceil_mode or pool.return_indices)
    if usual and conv.groups == 1 and conv.in_channels <= STEM_CHANNELS and _is_padded_by_zeros(conv):
        model.set_submodule(place, DeployedStem(conv))
        for name, _ in readers[:2]:
            model.set_submodule(name, nn.Identity())
