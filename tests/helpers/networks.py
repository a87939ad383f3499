"""Small networks that are not new any more, and how close a deployed one has to come."""

import timm
import torch
import torch.nn as nn

from dgc_fastai import set_progress

SMALL = {
    "dgc_densenet22": dict(num_classes=5),
    "dgc_resnet18": dict(num_classes=5),
    "dgc_resnet50": dict(num_classes=5, layers=(1, 1, 1, 1)),
    "dgc_mobilenetv2_100": dict(num_classes=5),
}


def network(name="dgc_densenet22", progress=1.0, **keywords):
    """A network whose norms and biases are not those of a new one."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name] | keywords)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    model.init_norm_stats()
    nn.init.normal_(model.get_classifier().weight, std=0.1)
    set_progress(model, progress)
    return model.eval()


def agree(ours, theirs, limit=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit * float(theirs.abs().max()))


def images(batch=3, size=64):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
