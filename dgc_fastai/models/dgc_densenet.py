"""DenseNets whose 1x1 convolutions are DGC layers, and their baselines without gates. Paper, section 4.

`dgc_densenet86` is the paper's CIFAR network, `dgc_condensenet74` its ImageNet network; `dgc_densenet22` is smaller.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import create_classifier
from timm.models import checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..layers.dynamic_group_conv import DynamicGroupConv2d, fitting_granularity
from ..layers.group_conv import GroupConv2d
from ._blocks import Connection, GatedModel, connect
from ._registration import imagenet_cfg, register_network, with_baselines

__all__ = ["DGCDenseNet"]


class NormReluConv(nn.Sequential):
    """Batch norm, ReLU, convolution. A DGC layer replaces all three where the convolution is 1x1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        groups: int = 1,
        conv: type[nn.Conv2d] = nn.Conv2d,
    ):
        padding = kernel_size // 2
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(in_channels),
                act=nn.ReLU(inplace=True),
                conv=conv(in_channels, out_channels, kernel_size, padding=padding, groups=groups, bias=False),
            )
        )


class DenseLayer(nn.Module):
    """Concatenates its input and the output of two convolutions: [B, C, H, W] -> [B, C + growth, H, W]."""

    def __init__(self, conv1: nn.Module, conv2: nn.Module):
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(self.conv1(x))], dim=1)


@contextmanager
def frozen_norm_stats(module: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of batch norms as they are, so that a recomputed batch does not count twice."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _convolve_all(conv1: nn.Module, *features: Tensor) -> Tensor:
    return conv1(torch.cat(features, dim=1))


def _recompute_contexts(conv1: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the forward pass and of its recomputation."""
    return nullcontext(), frozen_norm_stats(conv1)


class DenseStage(nn.Module):
    """Average pooling by two (`pool`), then dense layers."""

    def __init__(self, layers: Sequence[DenseLayer], pool: bool, memory_efficient: bool = False):
        super().__init__()
        self.pool = nn.AvgPool2d(2) if pool else nn.Identity()
        self.layers = nn.Sequential(*layers)
        self.memory_efficient = memory_efficient
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        if not torch.jit.is_scripting():
            if self.grad_checkpointing:
                return checkpoint_seq(self.layers, x)
            if self.memory_efficient and self.training and torch.is_grad_enabled():
                return self._forward_recomputing(x)
        return self.layers(x)

    @torch.jit.ignore
    def _forward_recomputing(self, x: Tensor) -> Tensor:
        """As `layers`, but saves only the channels that each layer adds. The concatenations, whose total size grows
        with the square of the depth, and their norms and ReLUs are recomputed in the backward pass (Pleiss et al.,
        arXiv:1707.06990)."""
        features = [x]
        for layer in self.layers:
            assert isinstance(layer, DenseLayer)
            hidden = checkpoint(
                partial(_convolve_all, layer.conv1),
                *features,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(_recompute_contexts, layer.conv1),
            )
            features.append(layer.conv2(hidden))
        return torch.cat(features, dim=1)


def _check(stages: Sequence[int], growth: Sequence[int], group_3x3: int) -> None:
    if len(stages) != len(growth):
        raise ValueError(f"stages={list(stages)} and growth={list(growth)} differ in length")
    for rate in growth:
        if rate % group_3x3:
            raise ValueError(f"group_3x3={group_3x3} does not divide growth={rate}")


class DGCDenseNet(GatedModel):
    """DenseNet with DGC layers for its 1x1 convolutions and no compression between stages.

    Args:
        stages: number of dense layers in each stage.
        growth: channels that each layer of a stage adds, one number a stage.
        bottleneck: the 1x1 convolution has bottleneck x growth outputs.
        group_3x3: groups of the 3x3 convolution.
        heads, squeeze_rate, gate_factor, zero_init_gates: of every DGC layer, see `DynamicGroupConv2d`.
        granularity: likewise, a power of two; where it does not divide a layer's input channels, the largest one that
            does.
        stem_stride: 1 for CIFAR's 32 px images, 2 for ImageNet.
        connection: "dgc", or "dense" for ordinary 1x1 convolutions, where `heads`, `squeeze_rate` and
            `gate_factor` have no effect, or "sgc" for 1x1 group convolutions with as many groups as `heads`.
        memory_efficient: recompute concatenations in the backward pass instead of saving them; same numbers, less
            memory, more time.
        num_classes, in_chans, global_pool, drop_rate: as in every timm model.

    Raises:
        ValueError: stages and growth differ in length, heads or group_3x3 does not divide the channels of a layer, or
            granularity is no power of two.
    """

    @staticmethod
    def feature_cfg(keywords: dict[str, Any]) -> dict[str, Any]:
        # One feature map for each stage.
        return dict(flatten_sequential=True, out_indices=tuple(range(len(keywords["stages"]))))

    def __init__(
        self,
        stages: Sequence[int] = (14, 14, 14),
        growth: Sequence[int] = (8, 16, 32),
        bottleneck: int = 4,
        group_3x3: int = 4,
        heads: int = 4,
        squeeze_rate: int = 16,
        gate_factor: float = 0.25,
        stem_stride: int = 1,
        connection: Connection = "dgc",
        memory_efficient: bool = False,
        zero_init_gates: bool = False,
        granularity: int = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        _check(stages, growth, group_3x3)
        self.num_classes, self.in_chans = num_classes, in_chans
        gating: dict[str, Any] = dict(
            heads=heads, squeeze_rate=squeeze_rate, gate_factor=gate_factor, zero_init_gates=zero_init_gates
        )

        def conv1x1(in_channels: int, out_channels: int) -> nn.Module:
            if connection == "dgc":  # which has a norm and a ReLU of its own
                size = fitting_granularity(in_channels, granularity)
                return DynamicGroupConv2d(in_channels, out_channels, kernel_size=1, granularity=size, **gating)
            block = NormReluConv(in_channels, out_channels, kernel_size=1)
            block.conv = connect(cast(nn.Conv2d, block.conv), connection, **gating)
            return block

        # Baselines are trained by PyTorch's operators alone.
        grouped = GroupConv2d if connection == "dgc" else nn.Conv2d
        channels, reduction = 2 * growth[0], stem_stride
        self.stem = nn.Conv2d(in_chans, channels, 3, stride=stem_stride, padding=1, bias=False)
        self.stages = nn.Sequential()
        self.feature_info = []
        for index, (depth, rate) in enumerate(zip(stages, growth)):
            layers = []
            for _ in range(depth):
                width = bottleneck * rate
                conv2 = NormReluConv(width, rate, kernel_size=3, groups=group_3x3, conv=grouped)
                layers.append(DenseLayer(conv1x1(channels, width), conv2))
                channels += rate
            self.stages.append(DenseStage(layers, index > 0, memory_efficient))
            reduction *= 2 if index > 0 else 1
            self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=f"stages.{index}"))

        self.num_features = channels
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.act: nn.Module = nn.ReLU(inplace=True)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(num_classes, global_pool)
        self.init_weights()
        if connection == "dgc":
            self.init_norm_stats()

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # As in the authors' code, the fan-out of a group convolution counts the filters of all groups.
                kh, kw = module.kernel_size
                nn.init.normal_(module.weight, std=(2 / (kh * kw * module.out_channels)) ** 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.layers\.(\d+)"
        return dict(stem=r"^stem", blocks=[(blocks, None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            assert isinstance(stage, DenseStage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        device, dtype = self.stem.weight.device, self.stem.weight.dtype
        self._set_classifier(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        self.classifier.to(device=device, dtype=dtype).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of the selected stages, and the final features unless `intermediates_only`.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n stages if a number, all if None, else those listed.
            norm: apply the final norm and ReLU to the last stage's intermediate.
            stop_early: run no stage after the last selected one.
            output_fmt: only "NCHW".
            intermediates_only: do not return the final features.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            if stop_early and index > max_index:
                break
            x = stage(x)
            if index in take_indices:
                intermediates.append(self.act(self.norm(x)) if norm and index == last else x)
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == last:
            x = self.act(self.norm(x))
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Delete what the selected intermediates do not need."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if pruned or prune_norm:
            self.norm, self.act = nn.Identity(), nn.Identity()
        if pruned:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cifar_cfg(**kwargs) -> dict[str, Any]:
    # CIFAR-10's statistics, rounded as in the authors' code.
    mean, std = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)
    cfg = dict(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=mean, std=std)
    return imagenet_cfg(**cfg, **kwargs)


_HEAD = dict(first_conv="stem", classifier="classifier")
default_cfgs = generate_default_cfgs(
    {
        **{name: _cifar_cfg(**_HEAD) for name in with_baselines("dgc_densenet22", "dgc_densenet86")},
        **{name: imagenet_cfg(pool_size=(7, 7), **_HEAD) for name in with_baselines("dgc_condensenet74")},
    }
)


# As published for CIFAR, 32 px, and for ImageNet, 224 px, both with gate factor 0.25.
register_network(DGCDenseNet, "dgc_densenet86", stages=(14, 14, 14), growth=(8, 16, 32))
register_network(DGCDenseNet, "dgc_condensenet74", stages=(4, 6, 8, 10, 8), growth=(8, 16, 32, 64, 128), stem_stride=2)
# An eighth of dgc_densenet86's operations, for training without a GPU.
register_network(DGCDenseNet, "dgc_densenet22", stages=(3, 3, 4), growth=(8, 16, 32))
