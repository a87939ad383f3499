"""Normalization layers, ReLUs and pooling: where `deploy` may fold them it does, and the numbers stay the same."""

import pytest
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

from dgc_fastai.inference import passes
from dgc_fastai.inference.modules import DeployedConv2d, DeployedStem
from helpers.passes import Body, count, gated, unchanged_numbers

# Normalization layers


@pytest.mark.parametrize(
    "conv, norm, left",
    [
        pytest.param(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Identity, id="convolution"),
        pytest.param(nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), nn.Identity, id="group convolution"),
        pytest.param(gated(), nn.BatchNorm2d(8), nn.Identity, id="DGC layer"),
        pytest.param(gated(bias=True), nn.BatchNorm2d(8, affine=False), nn.Identity, id="without weights"),
        pytest.param(gated(), BatchNormAct2d(8), nn.ReLU, id="with its own activation"),
        pytest.param(gated(), nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d, id="without statistics"),
        pytest.param(gated(), nn.GroupNorm(2, 8), nn.GroupNorm, id="of another kind"),
    ],
)
def test_norms(conv, norm, left):
    with unchanged_numbers(nn.Sequential(conv, norm)) as net:
        passes.fold_norms(net)
        assert type(net.root[0][1]) is left


def two_norms(self, x):
    y = self.conv(x)
    return self.norm(y) + y


def norm_twice(self, x):
    return self.norm(self.norm(self.conv(x)))


def conv_twice(self, x):
    return self.norm(self.conv(self.conv(x)))


@pytest.mark.parametrize("forward", [two_norms, norm_twice, conv_twice])
def test_norms_whose_convolution_or_statistics_others_need_are_left(forward):
    with unchanged_numbers(Body(forward, conv=gated(), norm=nn.BatchNorm2d(8))) as net:
        passes.fold_norms(net)
        assert isinstance(net.root[0].norm, nn.BatchNorm2d)


@pytest.mark.parametrize("place", [0, 1])
def test_modules_with_hooks_are_left(place):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model[place].register_forward_hook(lambda module, inputs, output: output + 1)
    with unchanged_numbers(model) as net:
        passes.fold_norms(net)
        assert count(net, nn.BatchNorm2d) == 1


def test_a_module_of_two_names_is_replaced_under_both():
    conv, norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    model = Body(lambda self, x: self.body_(x), conv=conv, norm=norm, body_=nn.Sequential(conv, norm))
    with unchanged_numbers(model) as net:
        passes.fold_norms(net)
        assert not count(net, nn.BatchNorm2d)


# ReLUs


def relu_module(self, x):
    return self.act(self.conv(x))


def relu_function(self, x):
    return F.relu(self.conv(x), inplace=True)


def relu_method(self, x):
    return self.conv(x).relu_()


def relu_twice(self, x):  # as torchvision has it
    return self.act(self.conv2(self.act(self.conv(x))))


@pytest.mark.parametrize("forward", [relu_module, relu_function, relu_method, relu_twice])
def test_relus(forward):
    block = Body(forward, conv=gated(), conv2=gated(), act=nn.ReLU(inplace=True))
    with unchanged_numbers(nn.Sequential(block)) as net:
        passes.fold_relus(net)
        assert net.module(net.calls(DeployedConv2d)[0]).relu
        assert not any(net.is_relu(node) for node in net.graph.nodes)


def read_twice(self, x):
    y = self.conv(x)
    return self.act(y) + y


@pytest.mark.parametrize(
    "forward, act",
    [
        pytest.param(relu_module, nn.SiLU(), id="another activation"),
        pytest.param(read_twice, nn.ReLU(), id="read twice"),
    ],
)
def test_relus_that_are_left(forward, act):
    with unchanged_numbers(nn.Sequential(Body(forward, conv=gated(), act=act))) as net:
        passes.fold_relus(net)
        assert not net.root[0][0].conv.relu


# Pooling

POOL = dict(kernel_size=3, stride=2, padding=1)


def pooled_function(self, x):
    return self.pool(F.relu(self.conv(x)))


@pytest.mark.parametrize("forward", [pooled_function, lambda self, x: self.pool(self.act(self.conv(x)))])
def test_pooling(forward):
    stem = Body(forward, conv=nn.Conv2d(3, 8, 3), act=nn.ReLU(), pool=nn.MaxPool2d(**POOL))
    with unchanged_numbers(nn.Sequential(stem), (2, 3, 9, 9)) as net:
        passes.fold_pooling(net)
        assert count(net, DeployedStem) == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_stem_with_hooks_is_left_alone(place):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(**POOL)).eval()
    model[place].register_forward_hook(lambda module, inputs, output: output + 1)
    with unchanged_numbers(model, (1, 3, 9, 9)) as net:
        passes.fold_pooling(net)
        assert not count(net, DeployedStem)
