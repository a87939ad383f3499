"""ResNets in which every convolution after the stem is a DGC layer, and their baselines without gates.

The network is timm's, so everything that timm offers for a ResNet works. A DGC layer replaces each convolution; the
batch norm that follows stays. Paper, section 4 (ResNet-18 on ImageNet).
"""

from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..layers.gate_schedule import dgc_layers
from ._blocks import Connection, GatedModel
from ._registration import imagenet_cfg, register_network, with_baselines

__all__ = ["DGCResNet"]


class DGCResNet(GatedModel, ResNet):
    """timm's `ResNet` with DGC layers in place of the convolutions of its four stages.

    Args:
        heads, squeeze_rate, gate_factor, zero_init_gates: of every DGC layer, see `DynamicGroupConv2d`.
        granularity: likewise, a power of two; where it does not divide a layer's input channels, the largest one that
            does.
        preact: give each DGC layer its own batch norm and ReLU, as the authors do, in addition to those of a ResNet.
        connection: "dgc", or "dense" for the ordinary ResNet, where the arguments above have no effect, or
            "sgc" for ordinary group convolutions with as many groups as `heads`.
        memory_efficient: recompute the outputs of the DGC layers' own norms in the backward pass instead of saving
            them (an ordinary ResNet does not have these norms); same numbers.
        kwargs: of `timm.models.resnet.ResNet`.

    Raises:
        ValueError: heads does not divide the channels, or granularity is no power of two.
    """

    def __init__(
        self,
        *args,
        heads: int = 4,
        squeeze_rate: int = 16,
        gate_factor: float = 0.45,
        connection: Connection = "dgc",
        memory_efficient: bool = True,
        preact: bool = True,
        zero_init_gates: bool = False,
        granularity: int = 1,
        **kwargs,
    ):
        # The authors' network, like torchvision's, does not start residual branches at zero.
        super().__init__(*args, zero_init_last=False, **kwargs)  # type: ignore[misc]
        gating = dict(
            heads=heads,
            squeeze_rate=squeeze_rate,
            gate_factor=gate_factor,
            zero_init_gates=zero_init_gates,
            granularity=granularity,
        )
        self.connect_convolutions(lambda name, conv: name.startswith("layer"), connection, preact, **gating)
        if connection == "dgc":
            for layer in dgc_layers(self):
                layer.memory_efficient = memory_efficient
            self.init_norm_stats()
        elif connection == "sgc":
            self.init_weights(zero_init_last=False)


_CFG = imagenet_cfg(first_conv="conv1", classifier="fc", pool_size=(7, 7))
default_cfgs = generate_default_cfgs(
    dict.fromkeys(with_baselines("dgc_resnet18", "dgc_resnet34", "dgc_resnet50"), _CFG)
)

# As published for ImageNet, with gate factor 0.45.
register_network(DGCResNet, "dgc_resnet18", block=BasicBlock, layers=(2, 2, 2, 2))
# Deeper ones, which the paper does not have.
register_network(DGCResNet, "dgc_resnet34", block=BasicBlock, layers=(3, 4, 6, 3))
register_network(DGCResNet, "dgc_resnet50", block=Bottleneck, layers=(3, 4, 6, 3))
