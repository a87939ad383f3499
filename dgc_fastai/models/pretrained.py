"""timm's ImageNet weights for networks whose dense layout is that of a timm network."""

import logging
import warnings
from typing import Any

import timm
import torch

from ..layers.gate_schedule import dgc_layers
from ..recipe.schema import PRETRAINED
from ..utils.errors import CheckpointError

__all__ = ["load_pretrained"]


def load_pretrained(network: torch.nn.Module, arch: str, in_chans: int = 3) -> str:
    """Load timm's weights into a new network, which then computes what timm's does, up to the classifier.

    The classifier keeps its own weights, since it has other classes. The gates start at one, as those of `convert`.

    Args:
        network: by `timm.create_model(arch)`, ResNets with `preact=False`.
        arch: its name, a key of `recipe.schema.PRETRAINED`, or with `_dense` after it.
        in_chans: number of channels of the images.

    Returns:
        The name of timm's weights, such as "resnet18.a1_in1k".

    Raises:
        ValueError: timm has no weights for this network, or its layout is another one.
        CheckpointError: the weights can be neither fetched nor found in the cache.
    """
    name = PRETRAINED.get(arch.removesuffix("_dense"))
    if name is None:
        raise ValueError(f"timm has no weights for {arch}; it has for {', '.join(PRETRAINED)}")
    source = _fetch(name, in_chans)
    cfg: Any = source.pretrained_cfg
    head, state = f"{cfg['classifier']}.", source.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(head)}
    if kept.keys() != {key for key in network.state_dict() if not (key.startswith(head) or _is_of_gates(key))}:
        raise ValueError(f"{arch} has another layout than timm's {name}; set preact=False")
    network.load_state_dict(kept, strict=False)
    for layer in dgc_layers(network):
        layer.open_gates()
    return f"{name}.{cfg['tag']}"


def _is_of_gates(key: str) -> bool:
    return ".gates." in key or key.endswith(".inactive_channels")


def _fetch(name: str, in_chans: int) -> torch.nn.Module:
    level = logging.getLogger("huggingface_hub").level
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a warning at each of five attempts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=True, in_chans=in_chans)
    except Exception as error:  # of the network, of the hub, of a damaged file in its cache
        reason = str(error).split(". ")[0].split("\n")[0]
        raise CheckpointError(f"cannot fetch timm's weights of {name}: {reason}") from None
    finally:
        logging.getLogger("huggingface_hub").setLevel(level)
