"""Concatenations in place: where nobody notices that values share a tensor, and nowhere else."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from dgc_fastai import deploy
from dgc_fastai.inference import passes
from dgc_fastai.inference.graph import replace_module
from dgc_fastai.inference.modules import DeployedGroupConv2d
from helpers.networks import agree
from helpers.passes import changed, gated, unchanged_numbers


class Dense(nn.Module):
    """Four layers of a dense block, put together by `forward`."""

    def __init__(self, forward, groups=2):
        super().__init__()
        self.body = forward
        self.act = nn.ReLU(inplace=True)
        self.convs = nn.ModuleList(gated(8 + 4 * place, 8) for place in range(4))
        self.groups = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1, groups=groups) for _ in range(4))

    def layer(self, place, x):
        return self.groups[place](self.convs[place](x))

    def forward(self, x):
        return self.body(self, x)


def one_by_one(self, x):
    for place in range(4):
        x = torch.cat([x, self.layer(place, x)], dim=1)
    return x


def from_a_list(self, x):
    features = [x]
    for place in range(4):
        features.append(self.layer(place, torch.cat(features, 1)))
    return torch.cat(features, 1)


def two_at_once(self, x):
    x = torch.cat([x, self.layer(0, x), self.layer(0, x)], 1)
    return torch.cat([x, F.relu(self.layer(2, x))], 1)


def in_places(net, function="append"):
    return sum(getattr(node.target, "__name__", "").startswith(function) for node in net.graph.nodes)


def group_convolutions(net):
    for conv in list(net.root.modules()):
        if type(conv) is nn.Conv2d and conv.groups > 1:
            replace_module(net.root, conv, DeployedGroupConv2d(conv))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("forward, appended, direct", [(one_by_one, 4, 4), (from_a_list, 4, 4), (two_at_once, 3, 0)])
def test_concatenations(forward, appended, direct, groups):
    with unchanged_numbers(nn.Sequential(Dense(forward, groups))) as net:
        group_convolutions(net)
        passes.concatenate_in_place(net)
        assert in_places(net) == appended
        assert in_places(net, "append_result") == (direct if groups > 1 else 0)
        assert not any(node.target is torch.cat for node in net.graph.nodes)


def once(self, x):
    return torch.cat([x, self.layer(0, x)], 1)


def overwritten(self, x):
    for place in range(4):
        x = torch.cat([x, self.layer(place, x)], 1)
        y = x
        x = self.act(x)
    return x * y


def a_part_overwritten(self, x):
    y = self.layer(0, x)
    z = torch.cat([x, y], 1)
    z = torch.cat([z, self.layer(1, z)], 1)
    return torch.cat([z, self.act(y)], 1)


def read_later(self, x):
    y = torch.cat([x, self.layer(0, x)], 1)
    z = torch.cat([y, self.layer(1, y)], 1)
    return self.act(z)[:, :12] + y


def along_rows(self, x):
    x = torch.cat([x, self.convs[0](x)], 2)
    return torch.cat([x, x], 2)


def of_unknown_channels(self, x):
    y = torch.cat([x, self.layer(0, x)[:, 1:]], 1)
    return torch.cat([y, self.layer(0, x)[:, 1:]], 1)


@pytest.mark.parametrize(
    "forward", [once, overwritten, a_part_overwritten, read_later, along_rows, of_unknown_channels]
)
def test_concatenations_that_are_left(forward):
    with unchanged_numbers(nn.Sequential(Dense(forward))) as net:
        group_convolutions(net)
        passes.concatenate_in_place(net)
        assert in_places(net) == 0


def test_concatenations_in_other_types_and_where_autograd_follows():
    deployed = deploy(changed(nn.Sequential(Dense(one_by_one))))
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        expected = deployed(x)
        with torch.autocast("cpu", torch.bfloat16):
            agree(deployed(x).float(), expected, 0.05)
        agree(deployed.bfloat16()(x.bfloat16()).float(), expected, 0.05)
        agree(torch.jit.trace(deployed.float(), x)(x), expected, 0.05)
        assert deployed(x[:0]).shape == (0, 24, 6, 5)
    deployed(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0
