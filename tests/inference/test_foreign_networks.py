"""Networks that know nothing of this package, converted: `deploy` finds in them what it folds."""

import pytest
import timm
import torch
import torchvision

from dgc_fastai import convert, deploy, set_progress
from helpers.golden import evaluating
from helpers.networks import agree, images
from helpers.passes import changed


def steps(module):
    return [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]


def converted(model):
    model = evaluating(changed(model), images())
    convert(model)
    set_progress(model, 1)
    return model


@pytest.mark.parametrize(
    "make, additions, concatenations",
    [
        pytest.param(lambda: timm.create_model("resnet10t", num_classes=5), 4, 0, id="timm's ResNet"),
        pytest.param(lambda: torchvision.models.resnet18(num_classes=5), 8, 0, id="torchvision's ResNet"),
        pytest.param(
            lambda: timm.create_model("densenet121", block_config=(2, 2), num_classes=5), 0, 4, id="timm's DenseNet"
        ),
        pytest.param(
            lambda: torchvision.models.DenseNet(block_config=(2, 3), num_classes=5), 0, 5, id="torchvision's DenseNet"
        ),
    ],
)
def test_converted_networks(make, additions, concatenations):
    model = converted(make())
    deployed = deploy(model)
    nodes = [node for part in deployed.modules() if isinstance(part, torch.fx.GraphModule) for node in steps(part)]
    assert sum(node.op == "call_module" and len(node.args) == 2 for node in nodes) == additions
    assert sum(getattr(node.target, "__name__", "").startswith("append") for node in nodes) == concatenations
    assert type(deployed) is type(model)
    with torch.no_grad():
        agree(deployed(images()), model(images()))
