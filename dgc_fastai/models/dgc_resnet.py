"""ResNets whose every convolution after the stem is a DGC layer, and their dense twins.

The network is timm's, so everything timm offers for a ResNet works; a DGC layer takes each convolution's
place and keeps the batch norm that follows it. Paper, section 4 (ResNet-18 on ImageNet).
"""

import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from ..conv import DynamicGroupConv2d
from ._config import imagenet_cfg

__all__ = ["DGCResNet"]


class DGCResNet(ResNet):
    """timm's `ResNet` with DGC layers in place of the convolutions of its four stages.

    Args:
        heads, squeeze_rate, gate_factor: of every DGC layer, see `DynamicGroupConv2d`.
        dense: build the ordinary ResNet instead; the three arguments above then have no effect.
        kwargs: of `timm.models.resnet.ResNet`.
    """

    def __init__(
        self,
        *args,
        heads: int = 4,
        squeeze_rate: int = 16,
        gate_factor: float = 0.45,
        dense: bool = False,
        **kwargs,
    ):
        # The authors' network, like torchvision's, does not start residual branches at zero.
        super().__init__(*args, zero_init_last=False, **kwargs)
        if dense:
            return
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for parent in list(stage.modules()):
                for name, conv in list(parent.named_children()):
                    if isinstance(conv, nn.Conv2d):
                        gated = DynamicGroupConv2d(
                            conv.in_channels,
                            conv.out_channels,
                            conv.kernel_size,
                            conv.stride,
                            conv.padding,
                            conv.dilation,
                            heads,
                            squeeze_rate,
                            gate_factor,
                        )
                        setattr(parent, name, gated)


default_cfgs = generate_default_cfgs(
    {
        "dgc_resnet18": imagenet_cfg(first_conv="conv1", classifier="fc", pool_size=(7, 7)),
        "dgc_resnet18_dense": imagenet_cfg(first_conv="conv1", classifier="fc", pool_size=(7, 7)),
    }
)


def _create_dgc_resnet(variant: str, pretrained: bool, **kwargs) -> DGCResNet:
    return build_model_with_cfg(DGCResNet, variant, pretrained, **kwargs)


@register_model
def dgc_resnet18(pretrained: bool = False, **kwargs) -> DGCResNet:
    """ResNet-18 with DGC layers, as published for ImageNet (gate factor 0.45)."""
    args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_dgc_resnet("dgc_resnet18", pretrained, **dict(args, **kwargs))


@register_model
def dgc_resnet18_dense(pretrained: bool = False, **kwargs) -> DGCResNet:
    """The ordinary ResNet-18, baseline of `dgc_resnet18`."""
    args = dict(block=BasicBlock, layers=(2, 2, 2, 2), dense=True)
    return _create_dgc_resnet("dgc_resnet18_dense", pretrained, **dict(args, **kwargs))
