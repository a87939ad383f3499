"""MobileNetV2 whose 1x1 convolutions are DGC layers, and its baselines without gates. Not in the paper.

The network is timm's. Its 1x1 convolutions do nine tenths of the operations; each filter of the depthwise ones between
them has a single input channel, so there is nothing to select. Normalization layers and activations stay where
MobileNetV2 has them, since its bottlenecks are linear by design: the DGC layers have none of their own.
"""

from typing import Any

import torch.nn as nn
from timm.models import generate_default_cfgs
from timm.models._efficientnet_builder import decode_arch_def, efficientnet_init_weights
from timm.models.efficientnet import EfficientNet

from ._blocks import Connection, GatedModel
from ._registration import imagenet_cfg, register_network, with_baselines

__all__ = ["DGCMobileNetV2"]

# Type of block, repeats, kernel, stride, expansion and channels of each stage (Sandler et al., CVPR 2018, table 2).
_STAGES = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]


class DGCMobileNetV2(GatedModel, EfficientNet):
    """timm's MobileNetV2 with DGC layers in place of its 1x1 convolutions.

    Args:
        heads, squeeze_rate, gate_factor, zero_init_gates: of every DGC layer, see `DynamicGroupConv2d`.
        granularity: likewise, a power of two; where it does not divide a layer's input channels, the largest one that
            does.
        connection: "dgc", or "dense" for the ordinary MobileNetV2, where the arguments above have no effect, or
            "sgc" for ordinary group convolutions with as many groups as `heads`.
        kwargs: of `timm.models.efficientnet.EfficientNet`.

    Raises:
        ValueError: heads does not divide the channels, or granularity is no power of two.
    """

    @staticmethod
    def feature_cfg(keywords: dict[str, Any]) -> dict[str, Any]:
        return dict(feature_cls="getter")

    def __init__(
        self,
        heads: int = 4,
        squeeze_rate: int = 16,
        gate_factor: float = 0.25,
        connection: Connection = "dgc",
        zero_init_gates: bool = False,
        granularity: int = 1,
        **kwargs,
    ):
        super().__init__(decode_arch_def(_STAGES), **{"act_layer": nn.ReLU6, **kwargs})
        gating = dict(
            heads=heads,
            squeeze_rate=squeeze_rate,
            gate_factor=gate_factor,
            zero_init_gates=zero_init_gates,
            granularity=granularity,
        )
        self.connect_convolutions(lambda name, conv: conv.kernel_size == (1, 1), connection, preact=False, **gating)
        if connection == "dgc":
            self.init_norm_stats()
        elif connection == "sgc":
            efficientnet_init_weights(self)


default_cfgs = generate_default_cfgs(
    {
        name: imagenet_cfg(first_conv="conv_stem", classifier="classifier", pool_size=(7, 7))
        for name in with_baselines("dgc_mobilenetv2_100")
    }
)

register_network(DGCMobileNetV2, "dgc_mobilenetv2_100")
