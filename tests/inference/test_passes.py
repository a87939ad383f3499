"""What `deploy` folds, pass by pass: where it may it does, and where it may not the numbers stay the same."""

from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d

from dgc_fastai import DynamicGroupConv2d, convert, deploy, set_progress
from dgc_fastai.inference import passes
from dgc_fastai.inference.graph import Network, replace_module
from dgc_fastai.inference.modules import DeployedConv2d, DeployedGroupConv2d, DeployedStem
from helpers.golden import evaluating
from helpers.networks import agree, images, network


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
    for module in net.root.modules():
        if isinstance(module, (DeployedConv2d, DeployedGroupConv2d)):
            module.repack()
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


# Residuals


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


# Concatenations


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


# Whole networks that know nothing of this package


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
