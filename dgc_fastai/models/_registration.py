"""Registration with timm: each network, and its baselines without gates."""

import sys
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model

from ._blocks import GatedModel

_CONNECTIONS = {"": "dgc", "_dense": "dense", "_sgc": "sgc"}


def with_baselines(*names: str) -> list[str]:
    """The names of these networks and of their baselines: `_dense` and `_sgc`, static group convolutions."""
    return [name + suffix for name in names for suffix in _CONNECTIONS]


def register_network(network: type[GatedModel], name: str, **defaults: Any) -> None:
    """Register a network with timm, and its baselines `_dense` and `_sgc`.

    Args:
        network: its class. The module that defines it has a `default_cfgs` with all three names.
        name: for `timm.create_model`.
        defaults: keywords of `network`.
    """
    for suffix, connection in _CONNECTIONS.items():
        register_model(_entry_point(network, name + suffix, {**defaults, "connection": connection}))


def _entry_point(network: type[GatedModel], name: str, defaults: dict[str, Any]):
    def create(pretrained: bool = False, **kwargs) -> GatedModel:
        keywords = {**defaults, **kwargs}
        keywords.setdefault("feature_cfg", network.feature_cfg(keywords))
        return build_model_with_cfg(network, name, pretrained, **keywords)

    # timm looks the function up by its name in its module.
    create.__name__ = create.__qualname__ = name
    create.__module__ = network.__module__
    setattr(sys.modules[network.__module__], name, create)
    return create


def imagenet_cfg(**kwargs) -> dict[str, Any]:
    """timm's configuration of the ImageNet networks: 224 px, cropped from the center of 256 px."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "mit",
        **kwargs,
    }
