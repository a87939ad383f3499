"""The networks. Importing this registers them with timm."""

from timm.models._features_fx import register_notrace_module

from ..conv import DynamicGroupConv2d
from .dgc_densenet import DGCDenseNet
from .dgc_mobilenet import DGCMobileNetV2
from .dgc_resnet import DGCResNet

register_notrace_module(DynamicGroupConv2d)  # fx feature extraction takes the layer as a leaf

__all__ = ["DGCDenseNet", "DGCMobileNetV2", "DGCResNet"]
