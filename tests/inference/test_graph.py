"""Which parts of a network may be written anew from its graph."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn as nn

from dgc_fastai import DynamicGroupConv2d, deploy
from helpers.networks import agree


class Flat(nn.Module):
    """A network with a residual in its own forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = DynamicGroupConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.size = 5

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x)


class WithMethods(Flat):
    def features(self, x):
        return self.conv(x)


def test_a_network_of_nothing_but_a_forward_is_a_graph():
    model = Flat().eval()
    deployed = deploy(model)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        agree(deployed(x), model(x))
        assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), deployed(x))
        assert torch.equal(copy.deepcopy(deployed)(x), deployed(x))
    assert isinstance(deployed, torch.fx.GraphModule) and deployed.size == 5
    assert [node.target for node in deployed.graph.nodes if node.op == "call_module"] == ["conv"]


def test_a_network_with_methods_keeps_them():
    model = WithMethods().eval()
    deployed = deploy(model)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        agree(deployed(x), model(x))
    assert type(deployed) is WithMethods and deployed.features(x).shape == x.shape
    assert isinstance(deployed.norm, nn.Identity)


class Part(nn.Module):
    """What a part does beside its residual."""

    def __init__(self, forward):
        super().__init__()
        self.body = forward
        self.conv, self.act = DynamicGroupConv2d(8, 8, 3, padding=1), nn.ReLU()
        self.register_buffer("count", torch.zeros(()))
        self.seen = None

    def residual(self, x):
        return self.act(self.conv(x) + x)

    def forward(self, *args, **kwargs):
        return self.body(self, *args, **kwargs)


class Whole(nn.Module):
    def __init__(self, forward, call):
        super().__init__()
        self.part, self.call = Part(forward), call

    def forward(self, x):
        return self.call(self.part, x)

    def method(self):
        """Keeps the class."""


def remembering(self, x):
    self.seen = self.residual(x)
    return self.seen + 1


def changing_in_passing(self, x):
    y = self.residual(x)
    y.add_(1)  # a step whose result nobody reads
    return y * 2


@pytest.mark.parametrize(
    "forward, call, rewritten",
    [
        pytest.param(Part.residual, lambda part, x: part(x), True, id="called once"),
        pytest.param(Part.residual, lambda part, x: part(part(x)), False, id="called twice"),
        pytest.param(lambda self, x, y: self.residual(x) + y, lambda part, x: part(x, x), False, id="two arguments"),
        pytest.param(lambda self, x: self.residual(x), lambda part, x: part(x=x), False, id="by keyword"),
        pytest.param(lambda self, x: (self.residual(x), x), lambda part, x: part(x)[0], False, id="two results"),
        pytest.param(changing_in_passing, lambda part, x: part(x), False, id="a step that returns nothing"),
        pytest.param(remembering, lambda part, x: part(x) + part.seen, False, id="remembers"),
        pytest.param(lambda self, x: self.residual(x + self.count), lambda part, x: part(x), True, id="a buffer"),
    ],
)
def test_parts(forward, call, rewritten):
    model = Whole(forward, call).eval()
    deployed = deploy(model)
    assert isinstance(deployed.part, torch.fx.GraphModule) == rewritten
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        for _ in range(2):
            agree(deployed(x), model(x), 1e-5)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part(Part.residual)

    def forward(self, x):
        return self.part(x) if x.sum() > 0 else x


def test_nothing_is_rewritten_where_there_is_no_graph(caplog):
    model = Untraceable().eval()
    with caplog.at_level(logging.INFO, "dgc_fastai"):
        deployed = deploy(model)
    assert type(deployed.part) is Part and "Untraceable cannot be traced" in caplog.text
