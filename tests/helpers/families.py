"""The names of all networks, and small ones of each family."""

import re
from functools import partial
from unittest import mock

import timm
from timm.models._efficientnet_builder import round_channels

from dgc_fastai.models import dgc_mobilenet

NAMES = [
    "dgc_condensenet74",
    "dgc_densenet22",
    "dgc_densenet86",
    "dgc_mobilenetv2_100",
    "dgc_resnet18",
    "dgc_resnet34",
    "dgc_resnet50",
]
BASELINES = [name + suffix for name in NAMES for suffix in ("_dense", "_sgc")]
# Small enough for every test, with each family's every kind of layer.
_DENSENET = dict(stages=(1, 2, 1), growth=(4, 8, 8))
_RESNET = dict(channels=(16, 16, 32, 32), layers=(1, 1, 2, 1))
_MOBILENET = dict(round_chs_fn=partial(round_channels, multiplier=0.25), num_features=64)
FAMILIES = {"densenet": _DENSENET, "condensenet": _DENSENET, "mobilenet": _MOBILENET, "resnet": _RESNET}
# One name for each kind of block, where the others of its family have nothing to add.
KINDS = ["dgc_densenet22", "dgc_mobilenetv2_100", "dgc_resnet18", "dgc_resnet50"]


def small(name, **kwargs):
    sizes = next(sizes for family, sizes in FAMILIES.items() if family in name)
    shallow = [[re.sub(r"_r\d", "_r1", block) for block in stage] for stage in dgc_mobilenet._STAGES]
    with mock.patch.object(dgc_mobilenet, "_STAGES", shallow):  # MobileNetV2's depth is not a keyword
        return timm.create_model(name, **{**sizes, "num_classes": 7, **kwargs})
