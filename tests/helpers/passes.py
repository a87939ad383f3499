"""One pass of `deploy` on a small network: what it changes, and that the numbers stay the same."""

from contextlib import contextmanager

import torch
import torch.nn as nn

from dgc_fastai import DynamicGroupConv2d
from dgc_fastai.inference.graph import Network, replace_module
from dgc_fastai.inference.modules import DeployedConv2d
from helpers.networks import agree


def traced(model):
    """The model as a pass gets it."""
    root = nn.Sequential(model.eval().requires_grad_(False))
    for layer in list(root.modules()):
        if isinstance(layer, DynamicGroupConv2d):
            replace_module(root, layer, DeployedConv2d(layer))
    return Network.trace(root)


def run(net, x):
    """The model, after the passes."""
    net.lower()
    with torch.no_grad():
        return net.root(x)


def changed(module, *kinds):
    """Norms and biases that are not those of new modules, so that to fold one wrongly shows."""
    torch.manual_seed(1)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            for tensor in (child.weight, child.bias, child.running_mean, child.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return module.eval()


def gated(channels=8, out=8, **kwargs):
    return DynamicGroupConv2d(channels, out, 3, padding=1, heads=2, squeeze_rate=4, **kwargs)


def count(net, kind):
    return sum(isinstance(module, kind) for module in net.root.modules())


@contextmanager
def unchanged_numbers(model, size=(2, 8, 6, 5)):
    """A traced copy for a pass, after which the numbers must be the model's."""
    torch.manual_seed(0)
    x = torch.randn(size)
    with torch.no_grad():
        expected = changed(model)(x.clone())
    net = traced(model)
    yield net
    agree(run(net, x), expected, 1e-5)


class Body(nn.Module):
    """A module with the forward of a test."""

    def __init__(self, forward, **children):
        super().__init__()
        self.body = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.body(self, x)
