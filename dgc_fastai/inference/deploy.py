"""Networks for inference: each DGC layer in one call, and what surrounds convolutions folded into them."""

import copy
import logging

import torch
import torch.nn as nn

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..layers.group_conv import GroupConv2d
from .graph import Network, replace_module
from .modules import DeployedConv2d, DeployedGroupConv2d, is_plain
from .passes import concatenate_in_place, fold_norms, fold_pooling, fold_relus, fold_residuals, is_zero_padded

__all__ = ["deploy"]

_logger = logging.getLogger(__name__)


def deploy(model: nn.Module) -> nn.Module:
    """A frozen copy of a network for inference: the same numbers in less time.

    Each DGC layer is one call, into the C++ kernel on a CPU. The network is traced by `torch.fx`. Where nothing else
    reads what lies between, batch norms are folded into the convolutions before them, ReLUs and residual additions that
    a ReLU follows into DGC layers, and max pooling into the stem; the convolutions of dense blocks write their results
    to where they are concatenated. A network that cannot be traced has only its layers replaced, which is logged at
    level INFO. The number of inactive channels stays as it is.

    The copy takes and returns what the network does, works under `torch.compile` and `torch.export`, and is saved and
    loaded as any module, by `safetensors.torch.save_model` and `load_model`, the latter into a `deploy(model)` of the
    same network. Gradients reach its input; its weights cannot be trained.

    Args:
        model: any module, such as one of `timm.create_model` or `convert`. It is not changed.

    Returns:
        A module of the same class in evaluation mode, in which submodules whose additions or concatenations were folded
        are `torch.fx.GraphModule`s. It is itself one if its own forward has such, and its class no other public
        attribute.
    """
    root = nn.Sequential(copy.deepcopy(model).eval().requires_grad_(False))  # so that the model itself can be replaced
    for layer in list(root.modules()):
        if isinstance(layer, DynamicGroupConv2d) and _has_statistics(layer.norm):
            replace_module(root, layer, DeployedConv2d(layer))
    network = _trace(root)
    if network is not None:
        for fold in (fold_norms, fold_relus, fold_pooling, fold_residuals):
            fold(network)
    for conv in list(root.modules()):
        if not is_plain(conv, nn.Conv2d, GroupConv2d):
            continue
        assert isinstance(conv, nn.Conv2d)
        if conv.groups == 1:
            # oneDNN's convolutions and PyTorch's pooling are faster in this format, even for one image.
            conv.to(memory_format=torch.channels_last)
        elif conv.groups < conv.in_channels and is_zero_padded(conv):
            replace_module(root, conv, DeployedGroupConv2d(conv))
    if network is not None:
        concatenate_in_place(network)
        network.lower()
    return root[0].eval()


def _trace(root: nn.Sequential) -> Network | None:
    try:
        return Network.trace(root)
    except Exception as error:  # whatever a forward that is not a graph raises
        _logger.info("Nothing is folded: %s cannot be traced (%s)", type(root[0]).__name__, error)
        return None


def _has_statistics(norm: nn.Module) -> bool:
    """Whether a layer's norm can be folded; `nn.Identity` stands for none."""
    batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    return batch_norm or type(norm) is nn.Identity
