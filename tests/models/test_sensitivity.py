"""What each layer is worth: a network set by hand in which one layer matters, and what closing means."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dgc_fastai import DynamicGroupConv2d, convert
from dgc_fastai.models.allocation import allocate, mac_budget, mac_options
from dgc_fastai.models.cost import budget
from dgc_fastai.models.sensitivity import GATE_FACTORS, closed_forward, losses_by_channels, scan_layers
from helpers.golden import equal_states

NAMES = ["vital", "idle", "sparse"]


class ByHand(torch.nn.Module):
    """Adds what three layers say: of the first every channel counts, of the second none, of the third one in eight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 32, 1)
        for name in NAMES:
            setattr(self, name, torch.nn.Conv2d(32, 8, 3, padding=1))
        with torch.no_grad():
            self.vital.weight.mul_(20)
            self.idle.weight.mul_(1e-4)
            self.sparse.weight.mul_(20)
            self.sparse.weight[:, torch.arange(32) % 8 > 0] = 0

    def forward(self, x):
        x = self.stem(x).relu()
        return (self.vital(x) + self.idle(x) + self.sparse(x)).mean((2, 3))


@pytest.fixture(scope="module")
def network():
    return ByHand()


@pytest.fixture(scope="module")
def images():
    return torch.randn(70, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def losses(network, images):
    return scan_layers(network, NAMES, images, heads=4)


def test_the_layer_that_matters_is_found(losses):
    assert all(more > less for less, more in zip(losses["vital"], losses["vital"][1:]))
    assert losses["vital"][GATE_FACTORS.index(0.5)] > 0.05
    assert max(losses["idle"]) < 1e-6
    assert max(losses["sparse"]) < 1e-6, "each head keeps the eighth that its filters look at"


def test_the_layer_that_matters_is_kept(network, losses):
    converted = convert(ByHand().to("meta"), input_size=(3, 6, 6))
    cost = budget(converted, (3, 6, 6))
    layers = mac_options(converted, cost)
    layers = [replace(one, losses=losses_by_channels(losses[one.name], one.channels)) for one in layers]
    kept = allocate(layers, mac_budget(layers, cost, 0.6))
    assert kept["vital"] == 32 and kept["idle"] < 32 and kept["sparse"] < 32


def test_the_network_is_as_before(network, images):
    before = ByHand()
    network.train()
    calls = []
    scan_layers(network, NAMES[:2], images[:5], 4, lambda: calls.append(1))
    assert equal_states(before.state_dict(), network.state_dict()) and network.training
    assert len(calls) == 2 * len(GATE_FACTORS)
    for name in NAMES:
        assert "forward" not in vars(getattr(network, name))


def test_the_divergence_is_that_of_the_class_probabilities(network, images):
    expected = network.eval()(images).log_softmax(-1).exp()
    inner = ByHand().eval()
    inner.vital.forward = lambda x: closed_forward(network.vital, 4, 0.25, x)
    closed = inner(images).softmax(-1)
    divergence = (expected * (expected / closed).log()).sum(-1).mean()
    found = scan_layers(network, ["vital"], images, heads=4)["vital"][GATE_FACTORS.index(0.25)]
    assert found == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.parametrize("bias, stride", [(True, 1), (False, 2)])
def test_a_closed_convolution_is_a_dgc_layer_with_those_gates(bias, stride):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 12, 3, stride=stride, padding=1, bias=bias)
    x = torch.rand(5, 16, 7, 7) * torch.rand(5, 16, 1, 1)
    layer = DynamicGroupConv2d.like(conv, heads=4, preact=False, squeeze_rate=4)
    layer.weight, layer.bias = conv.weight, conv.bias
    norms = conv.weight.unflatten(0, (-1, 4)).flatten(3).square().sum((0, 3)).sqrt()
    contribution = x.square().mean((2, 3)).sqrt().unsqueeze(1) * norms
    rank = contribution.argsort(-1).argsort(-1)
    gates = (rank >= 8).float()
    layer.gates.forward = lambda pooled: gates
    with torch.no_grad():
        torch.testing.assert_close(closed_forward(conv, 4, 0.5, x), layer(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(closed_forward(conv, 4, 1.0, x), F.conv2d(x, conv.weight, conv.bias, stride, 1))


def test_losses_between_gate_factors_lie_between():
    found = losses_by_channels([1.0, 4.0, 16.0, 64.0], 16)
    assert found[[16, 12, 8, 4, 2]].tolist() == [0, 1, 2, 4, 8]
    assert found[10] == 1.5 and found[0] == 8 and (np.diff(found) <= 0).all()
