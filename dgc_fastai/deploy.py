"""Networks for inference: DGC layers in one call each, norms folded into the convolutions before them."""

import copy
import logging
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor
from torch.nn.modules.utils import _pair
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .conv import DynamicGroupConv2d
from .models.dgc_densenet import DenseStage, GroupConv2d
from .ops import cpu, folded_norm
from .ops.dense import STEM_CHANNELS, group_conv2d, pack_groups, stem
from .ops.layer import gated_layer, pack

__all__ = ["DeployedConv2d", "deploy"]

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
        if isinstance(module, DeployedConv2d) or _is_plain(module, *CONVOLUTIONS):
            _fold_followers(root, name, followers)
    for name, module in list(root.named_modules()):
        if _is_plain(module, *CONVOLUTIONS):
            _fold_pooling(root, name, followers)
    for name, module in list(root.named_modules()):
        if isinstance(module, DenseStage):
            root.set_submodule(name, DeployedStage(module))
        elif DeployedBlock.takes(module):
            root.set_submodule(name, DeployedBlock(module))
    for name, module in list(root.named_modules()):
        if not _is_plain(module, *CONVOLUTIONS):
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


class DeployedConv2d(nn.Module):
    """What `deploy` makes of a `DynamicGroupConv2d`: [B, C, H, W] -> [B, O, H', W'].

    Only the weight takes another type with `.to(dtype)`; what is small stays in float32, or float64.
    """

    scale: Optional[Tensor]
    shift: Optional[Tensor]
    bias: Optional[Tensor]

    PACKED = ("packed_weight", "winograd_weight", "packed_excite")
    SMALL = ("scale", "shift", "squeeze", "excite", "gate_bias", "bias")

    def __init__(self, layer: DynamicGroupConv2d):
        super().__init__()
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.rectify = False
        scale = shift = None
        if layer.preact:
            scale, shift = _folded(layer.norm, layer.weight.dtype)
        gates = layer.gates
        tensors = scale, shift, gates.squeeze, gates.excite, gates.bias, layer.bias
        small = cpu.sums_type(layer.weight.dtype)
        for name, tensor in zip(self.SMALL, tensors):
            self.register_buffer(name, None if tensor is None else tensor.detach().to(small).contiguous())
        self.register_buffer("weight", layer.weight.detach().contiguous())
        self.register_buffer("inactive_channels", layer.inactive_channels)
        for name in self.PACKED:
            self.register_buffer(name, self.weight.new_empty(0), persistent=False)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """With `residual` [B, O, H', W'], the ReLU of its sum with the result."""
        return gated_layer(x, *self._arguments, residual)

    def fold_norm(self, norm: nn.BatchNorm2d) -> None:
        """Take a batch norm that follows into the filters and the bias."""
        scale, shift = _folded(norm, self.weight.dtype)
        self.weight.mul_(scale.reshape(-1, 1, 1, 1))
        self.bias = shift.clone() if self.bias is None else self.bias * scale + shift

    def repack(self) -> None:
        """Make what the C++ kernel reads anew."""
        packed = pack(self.weight, self.squeeze, self.excite, self.stride, self.dilation)
        for name, tensor in zip(self.PACKED, packed):
            setattr(self, name, tensor)
        # Together, since to look up one buffer of a module takes as long as to convolve a few pixels.
        gating = self.squeeze, self.excite, self.gate_bias, self.inactive_channels
        geometry = self.stride, self.padding, self.dilation
        kept = self.weight.shape[1] - int(self.inactive_channels)
        self._arguments = self.scale, self.shift, *gating, self.weight, self.bias, self.rectify, *geometry, packed, kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        small = {name: getattr(self, name) for name in self.SMALL}
        super()._apply(fn, recurse)
        dtype = cpu.sums_type(self.weight.dtype)
        for name, before in small.items():
            if before is not None:
                setattr(self, name, before.to(self.weight.device, dtype))
        self.repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()

    def extra_repr(self) -> str:
        outputs, channels, *taps = self.weight.shape
        folded = ", bias=True" * (self.bias is not None) + ", relu=True" * self.rectify
        kernel = "x".join(map(str, taps))
        return (
            f"{channels}, {outputs}, kernel_size={kernel}, stride={self.stride[0]}, heads={len(self.squeeze)}{folded}"
        )


class DeployedGroupConv2d(nn.Module):
    """What `deploy` makes of a group convolution, such as the 3x3 ones of a DenseNet: by the C++ kernel, too."""

    bias: Optional[Tensor]

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.out_channels = conv.out_channels
        self.register_buffer("weight", conv.weight.detach().contiguous())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().contiguous())
        self.register_buffer("packed_weight", self.weight.new_empty(0), persistent=False)

    def forward(self, x: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """`out` [B, O, H', W'] is to be the result, if given."""
        return group_conv2d(x, *self._arguments, out)

    def repack(self) -> None:
        """Make what the C++ kernel reads anew."""
        self.packed_weight = pack_groups(self.weight, self.groups)
        geometry = self.stride, self.padding, self.dilation
        self._arguments = self.weight, self.bias, self.groups, *geometry, self.packed_weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()


class DeployedStem(DeployedGroupConv2d):
    """What `deploy` makes of a convolution of images, the ReLU and the max pooling after it."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)  # for where there is no C++ kernel

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, _, *rest = self._arguments
        return stem(x, weight, bias, *rest)


class DeployedBlock(nn.Module):
    """What `deploy` makes of a ResNet's block that ends in a DGC layer: that layer adds what the shortcut brings."""

    BRANCHES = {
        BasicBlock: ("conv1", "bn1", "drop_block", "act1", "aa", "conv2"),
        Bottleneck: ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3"),
    }
    REST = {BasicBlock: ("bn2", "act2"), Bottleneck: ("bn3", "act3")}

    def __init__(self, block: nn.Module):
        super().__init__()
        *self.branch, self.last = self.BRANCHES[type(block)]
        for name in (*self.branch, self.last, "downsample"):
            self.add_module(name, getattr(block, name))
        self.branch = [name for name in self.branch if not _is_plain(getattr(self, name), nn.Identity)]

    @classmethod
    def takes(cls, block: nn.Module) -> bool:
        """Whether a block does nothing else once its norms are folded."""
        if not _is_plain(block, *cls.BRANCHES):
            return False
        last, (norm, act) = cls.BRANCHES[type(block)][-1], cls.REST[type(block)]
        conv = getattr(block, last)
        return (
            _is_plain(conv, DeployedConv2d)
            and not conv.rectify
            and _is_plain(getattr(block, norm), nn.Identity)
            and _is_plain(getattr(block, act), nn.ReLU)
            and block.se is None
            and (block.drop_path is None or type(block.drop_path) is nn.Identity)
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for name in self.branch:
            x = getattr(self, name)(x)
        return getattr(self, self.last)(x, shortcut)


class DeployedStage(nn.Module):
    """What `deploy` makes of a `DenseStage`: its layers write what they add into one tensor, without concatenations,
    whose sizes add up to the square of the depth."""

    def __init__(self, stage: DenseStage):
        super().__init__()
        self.pool, self.layers = stage.pool, stage.layers
        for layer in self.layers:
            if type(layer.conv2.norm) is type(layer.conv2.act) is nn.Identity:
                layer.conv2 = layer.conv2.conv

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or (torch.is_grad_enabled() and x.requires_grad):
            return self.layers(x)
        channels = x.shape[1]
        added = [getattr(layer.conv2, "conv", layer.conv2).out_channels for layer in self.layers]
        features = x.new_empty(len(x), channels + sum(added), *x.shape[2:])
        features[:, :channels] = x
        for layer, more in zip(self.layers, added):
            hidden, out = layer.conv1(features[:, :channels]), features[:, channels : channels + more]
            if isinstance(layer.conv2, DeployedGroupConv2d):
                layer.conv2(hidden, out)
            else:
                out.copy_(layer.conv2(hidden))
            channels += more
        return features


def _folded(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dtype = cpu.sums_type(dtype)
    return folded_norm.affine(norm, norm.running_mean.to(dtype), (norm.running_var.to(dtype) + norm.eps).rsqrt())


def _has_statistics(norm: nn.Module) -> bool:
    """Whether a layer's norm is one to be folded; `nn.Identity` is that of a layer without."""
    batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    return batch_norm or type(norm) is nn.Identity


def _is_padded_by_zeros(conv: nn.Conv2d) -> bool:
    return isinstance(conv.padding, tuple) and conv.padding_mode == "zeros"


def _is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether it does what one of these kinds does, and nothing besides."""
    return type(module) in kinds and not (module._forward_hooks or module._forward_pre_hooks)


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
        if _is_plain(reader, nn.Identity):
            continue
        rest = nn.Identity()
        norm = _is_plain(reader, nn.BatchNorm2d) or _is_plain(reader, BatchNormAct2d)
        if norm and not normed and reader.running_mean is not None:
            if gated:
                conv.fold_norm(reader)
            else:
                model.set_submodule(place, fuse_conv_bn_eval(conv, reader))
            normed = True
            if type(reader) is BatchNormAct2d:  # timm's, with an activation of its own
                rest = reader.act if type(reader.drop) is nn.Identity else nn.Sequential(reader.drop, reader.act)
        elif _is_plain(reader, nn.ReLU) and gated:
            rest = reader
        else:
            return
        if _is_plain(rest, nn.ReLU) and gated:
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
        if not _is_plain(reader, nn.Identity):
            readers.append((name, reader))
    if len(readers) < 2 or not (_is_plain(readers[0][1], nn.ReLU) and _is_plain(readers[1][1], nn.MaxPool2d)):
        return
    pool = readers[1][1]
    sizes = [_pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    usual = sizes == [(3, 3), (2, 2), (1, 1), (1, 1)] and not (pool.ceil_mode or pool.return_indices)
    if usual and conv.groups == 1 and conv.in_channels <= STEM_CHANNELS and _is_padded_by_zeros(conv):
        model.set_submodule(place, DeployedStem(conv))
        for name, _ in readers[:2]:
            model.set_submodule(name, nn.Identity())
