"""The networks. Importing this registers them with timm."""

from timm.models._features_fx import register_notrace_module

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..layers.group_conv import GroupConv2d
from .dgc_densenet import DGCDenseNet
from .dgc_mobilenet import DGCMobileNetV2
from .dgc_resnet import DGCResNet

# timm's feature extraction by torch.fx must not trace into these.
register_notrace_module(DynamicGroupConv2d)
register_notrace_module(GroupConv2d)

__all__ = ["DGCDenseNet", "DGCMobileNetV2", "DGCResNet"]
