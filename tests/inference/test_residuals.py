"""Residual additions: where `deploy` may fold them it does, and where it may not the numbers stay the same."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from dgc_fastai import deploy
from dgc_fastai.inference import passes
from dgc_fastai.inference.modules import DeployedConv2d
from helpers.networks import agree, images, network
from helpers.passes import Body, gated, unchanged_numbers


def add_in_place(self, x):
    y = self.conv(x)
    y += x
    return self.act(y)


def add_function(self, x):
    return F.relu(torch.add(self.conv(x), x))


def add_method(self, x):
    return self.conv(x).add_(x).relu_()


def shortcut_first(self, x):
    return self.act(x + self.conv(x))


def shortcut_computed_last(self, x):  # as timm has it
    y = self.conv2(self.act(self.conv(x)))
    y += self.down(x)
    return self.act(y)


def nested(self, x):
    return self.act(self.seq(x) + x)


def broadcast(self, x):
    mean = x.mean((2, 3), keepdim=True)
    return self.act(self.conv(x) + mean)


def block(forward):
    down = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    seq = nn.Sequential(gated(), nn.Identity())
    return nn.Sequential(Body(forward, conv=gated(), conv2=gated(), act=nn.ReLU(inplace=True), down=down, seq=seq))


def additions(net):
    return sum(node.op == "call_module" and len(node.args) == 2 for node in net.graph.nodes)


@pytest.mark.parametrize(
    "forward",
    [add_in_place, add_function, add_method, shortcut_first, shortcut_computed_last, nested, broadcast],
)
def test_residuals(forward):
    with unchanged_numbers(block(forward)) as net:
        passes.fold_residuals(net)
        assert additions(net) == 1
    assert isinstance(net.root[0][0], torch.fx.GraphModule)


def no_relu(self, x):
    return self.conv(x) + x


def scaled(self, x):
    return self.act(torch.add(self.conv(x), x, alpha=2))


def constant(self, x):
    return self.act(self.conv(x) + 1)


def rectified_before(self, x):
    return self.act(self.act(self.conv(x)) + x)


def branch_read_twice(self, x):
    y = self.conv(x)
    return self.act(y + x) * y


def shortcut_overwritten(self, x):
    x = self.conv2(x)
    y = self.conv(x)
    x += y
    return self.act(x) + x


def input_overwritten(self, x):
    x = self.conv2(x)
    y = self.conv(x)
    return self.act(y + self.act(x))


def input_overwritten_by_addition(self, x):
    x = self.conv2(x)
    y = self.conv(x)
    x += 1
    return self.act(y + x)


def other_name_overwritten(self, x):
    same = x = self.conv2(x)
    x += self.conv(x)
    return self.act(x) + same


@pytest.mark.parametrize(
    "forward",
    [
        no_relu, scaled, constant, rectified_before, branch_read_twice, shortcut_overwritten, input_overwritten,
        input_overwritten_by_addition, other_name_overwritten,
    ],
)  # fmt: skip
def test_residuals_that_are_left(forward):
    with unchanged_numbers(block(forward)) as net:
        passes.fold_relus(net)
        passes.fold_residuals(net)
        assert additions(net) == 0


@pytest.mark.parametrize("name", ["dgc_resnet18", "dgc_resnet50"])
def test_every_block_of_a_resnet(name):
    model = network(name)
    deployed = deploy(model)
    rewritten = [module for module in deployed.modules() if isinstance(module, torch.fx.GraphModule)]
    assert len(rewritten) == len([block for stage in (1, 2, 3, 4) for block in getattr(model, f"layer{stage}")])
    for module in rewritten:  # nothing but DGC layers is called
        assert all(isinstance(module.get_submodule(node.target), DeployedConv2d) for node in steps(module))
    weights = {key for key in model.state_dict() if key.endswith("weight") and "conv" in key and "norm" not in key}
    assert weights <= set(deployed.state_dict()), "weights keep their names"


def steps(module):
    return [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]


def hooked(model):
    model.layer2[0].bn2.register_forward_hook(lambda module, inputs, output: output + 1)


def hooked_block(model):
    model.layer2[0].register_forward_hook(lambda module, inputs, output: output + 1)


def squeezed(model):
    model.layer2[0].se = nn.Sigmoid()


def dropping(model):
    model.layer2[0].drop_path = nn.Tanh()


def otherwise_active(model):
    model.layer2[0].act2 = nn.SiLU()


@pytest.mark.parametrize("change", [hooked, hooked_block, squeezed, dropping, otherwise_active])
def test_blocks_with_more_to_them_are_left_alone(change):
    model = network("dgc_resnet18")
    change(model)
    deployed = deploy(model)
    assert type(deployed.layer2[0]) is type(model.layer2[0])
    assert isinstance(deployed.layer2[1], torch.fx.GraphModule)
    with torch.no_grad():
        agree(deployed(images()), model(images()))
