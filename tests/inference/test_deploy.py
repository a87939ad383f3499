"""`deploy`: the same numbers as the network, on every path, and the state of a module that can be saved and loaded."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_model, save_model
from torch.utils.flop_counter import FlopCounterMode

from dgc_fastai import DynamicGroupConv2d, convert, deploy, set_progress
from dgc_fastai.inference.modules import DeployedBlock, DeployedConv2d, DeployedGroupConv2d, DeployedStem
from dgc_fastai.ops.backends import cpu
from dgc_fastai.ops.layer import gated_layer, pack, plain
from helpers.operators import needs_compiler

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


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_same_numbers(name, progress):
    model = network(name, progress)
    deployed = deploy(model)
    with torch.no_grad():
        for batch in (1, 3):
            agree(deployed(images(batch)), model(images(batch)))


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_left_of_layers_and_their_norms(name):
    model = network(name)
    deployed = deploy(model)
    assert type(deployed) is type(model) and not deployed.training
    assert not any(isinstance(module, DynamicGroupConv2d) for module in deployed.modules())
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    assert norms == (1 if "densenet" in name else 0)  # the one before a DenseNet's classifier follows no convolution
    assert sum(isinstance(module, DynamicGroupConv2d) for module in model.modules()), "left as it was"


def test_what_the_network_has_beside_its_forward_is_still_there():
    deployed = deploy(network("dgc_resnet18"))
    features = deployed.forward_features(images())
    assert deployed.forward_head(features).shape == (3, 5) and deployed.get_classifier() is deployed.fc


@pytest.mark.parametrize("changes", [{}, dict(bias=True), dict(preact=False), dict(bias=True, preact=False)])
@pytest.mark.parametrize("shape", [(1, 1, 0), (3, 2, 1), (3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_single_layers(changes, shape, dtype):
    torch.manual_seed(0)
    kernel, stride, padding = shape
    layer = DynamicGroupConv2d(24, 36, kernel, stride, padding, heads=3, **changes).eval()
    for tensor in (layer.bias, layer.norm.bias if layer.preact else None):
        if tensor is not None:
            nn.init.normal_(tensor)
    layer.inactive_channels.fill_(13)
    x = torch.randn(2, 24, 9, 7)
    with torch.no_grad():
        expected = layer.double()(x.double())
        deployed = deploy(nn.Sequential(layer.float())).to(dtype)
        y = deployed(x.to(dtype))
    assert y.dtype == dtype
    assert deployed[0].gate_bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    agree(y.double(), expected, {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


class Branches(nn.Module):
    """Outputs that more than a norm reads, a module that is called twice, and norms that cannot be folded."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.free = nn.BatchNorm2d(8, track_running_stats=False)
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.first(x)
        y = self.norms[0](y) + y
        y = self.act(self.norms[1](self.act(self.second(y))))
        return self.act(self.free(self.third(y))), self.norms[2](y)


def test_only_what_nothing_else_reads_is_folded():
    torch.manual_seed(0)
    model = Branches().eval()
    for norm in model.norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias), nn.init.uniform_(norm.running_var, 0.5, 2)
    convert(model, heads=2, squeeze_rate=4, input_size=(8, 6, 6))
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for ours, theirs in zip(deploy(model)(x), model(x), strict=True):
            agree(ours, theirs)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = DynamicGroupConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.layer(x)) if x.sum() > 0 else x


def test_a_network_that_cannot_be_traced_keeps_its_norms(caplog):
    model = Untraceable().eval()
    with caplog.at_level(logging.INFO, "dgc_fastai"), torch.no_grad():
        deployed = deploy(model)
        agree(deployed(torch.ones(1, 8, 5, 5)), model(torch.ones(1, 8, 5, 5)))
    assert isinstance(deployed.norm, nn.BatchNorm2d) and isinstance(deployed.layer, DeployedConv2d)
    assert "Untraceable" in caplog.text


def test_what_does_more_than_it_seems_is_left_alone():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8) for _ in range(3)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    hooked, grouped = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding="same", groups=2)
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), norms[0], hooked, norms[1],
                          grouped, norms[2], nn.ReLU()).eval()  # fmt: skip
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    norms[2].register_forward_hook(lambda module, inputs, output: output.tanh())
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        agree(deploy(model)(x), model(x))


@pytest.mark.parametrize("name", ["dgc_resnet18", "dgc_resnet50"])
def test_blocks_add_what_the_shortcut_brings(name):
    model = network(name)
    deployed = deploy(model)
    count = sum(type(module) in DeployedBlock.BRANCHES for module in model.modules())
    assert sum(isinstance(module, DeployedBlock) for module in deployed.modules()) == count > 0
    assert {key for key in model.state_dict() if key.endswith("weight") and "conv" in key and "norm" not in key} <= set(
        deployed.state_dict()
    )


def test_blocks_with_more_to_them_are_left_alone():
    def hooked(model):
        model.layer2[0].bn2.register_forward_hook(lambda module, inputs, output: output + 1)

    def squeezed(model):
        model.layer2[0].se = nn.Sigmoid()

    def dropping(model):
        model.layer2[0].drop_path = nn.Tanh()

    def otherwise_active(model):
        model.layer2[0].act2 = nn.SiLU()

    for change in (hooked, squeezed, dropping, otherwise_active):
        model = network("dgc_resnet18")
        change(model)
        deployed = deploy(model)
        assert not isinstance(deployed.layer2[0], DeployedBlock) and isinstance(deployed.layer2[1], DeployedBlock)
        with torch.no_grad():
            agree(deployed(images()), model(images()))


POOL = dict(kernel_size=3, stride=2, padding=1)


@pytest.mark.parametrize(
    "conv, pool, merged",
    [
        (dict(kernel_size=7, stride=2, padding=3), POOL, True),
        (dict(kernel_size=(3, 5), padding=(0, 4), dilation=(2, 1), bias=False), POOL, True),
        (dict(kernel_size=3), dict(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)), True),
        (dict(kernel_size=3, padding="same"), POOL, False),
        (dict(kernel_size=3, groups=3), POOL, False),
        (dict(kernel_size=3, padding=1, padding_mode="reflect"), POOL, False),
        (dict(kernel_size=3), POOL | dict(ceil_mode=True), False),
        (dict(kernel_size=3), dict(kernel_size=2), False),
    ],
)
def test_the_stem_of_a_network(conv, pool, merged):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 21, **conv), nn.BatchNorm2d(21), nn.ReLU(), nn.MaxPool2d(**pool)).eval()
    nn.init.uniform_(model[1].weight, -1.5, 1.5), nn.init.normal_(model[1].bias)
    deployed = deploy(model)
    assert isinstance(deployed[0], DeployedStem) == merged
    compiled = torch.compile(deployed, backend="aot_eager", fullgraph=True)
    for size in ((2, 3, 37, 40), (1, 3, 90, 13), (0, 3, 9, 9), (1, 3, 9, 8)):
        x = torch.randn(size)
        with torch.no_grad():
            y = model(x)
            for form in (x, x.contiguous(memory_format=torch.channels_last), x.repeat(1, 2, 1, 1)[:, :3]):
                torch.testing.assert_close(deployed(form), y, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-5)
    x[0, 1, 4, 3] = float("nan")
    x[0, 1, 8, 7] = float("inf")
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)
        assert deployed(x).isnan().any()
    x = torch.randn(1, 3, 9, 8, requires_grad=True)
    for ours, theirs in zip(*(torch.autograd.grad(net(x).square().sum(), x) for net in (deployed, model))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_without_gates_in_bfloat16(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3 * groups, 21, 3, groups=groups), nn.ReLU(), nn.MaxPool2d(**POOL)).eval()
    nn.init.normal_(model[0].bias, std=3)
    x = torch.randn(2, 3 * groups, 12, 9)
    with torch.no_grad():
        y = deploy(model).bfloat16()(x.bfloat16())
        assert y.dtype == torch.bfloat16
        agree(y.float(), model(x), 2e-2)


def test_a_stem_with_more_to_it_is_left_alone():
    for place in (0, 1, 2):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(**POOL)).eval()
        model[place].register_forward_hook(lambda module, inputs, output: output + 1)
        x = torch.randn(1, 3, 9, 9)
        assert not isinstance(deploy(model)[0], DeployedStem)
        torch.testing.assert_close(deploy(model)(x), model(x))


def test_a_layer_by_itself():
    layer = DynamicGroupConv2d(8, 8, 3, padding=1).eval()
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        agree(deploy(layer)(x), layer(x))
    assert isinstance(deploy(layer), DeployedConv2d)


def test_saved_and_loaded(tmp_path):
    trained, new = network(), network(progress=0.0)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    deployed, other = deploy(trained), deploy(new)
    save_model(deployed, tmp_path / "deployed.safetensors")
    with torch.no_grad():
        assert not torch.allclose(other(images()), deployed(images()))
        load_model(other, tmp_path / "deployed.safetensors")
        assert torch.equal(other(images()), deployed(images())), "and what is packed was packed anew"


def test_copies_stand_for_themselves():
    deployed = deploy(network())
    copied = copy.deepcopy(deployed)
    with torch.no_grad():
        expected = deployed(images())
        for module in deployed.modules():
            if isinstance(module, DeployedConv2d):
                module.packed_weight.zero_()
        assert torch.equal(copied(images()), expected)


def test_compiled_as_one_graph():
    model = network()
    deployed = deploy(model)
    compiled = torch.compile(deployed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        agree(compiled(images()), model(images()))


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_exported_without_our_operators_and_1x1_layers_gather(progress):
    model = network(progress=progress)
    with torch.no_grad():
        program = torch.export.export(deploy(model), (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for batch in (2, 5):
            agree(program.module()(images(batch)), model(images(batch)))
    names = [str(node.target) for node in program.graph.nodes]
    assert not any("dgc_fastai" in name for name in names)
    layers = sum(isinstance(module, DynamicGroupConv2d) for module in model.modules())
    assert sum("topk" in name for name in names) == (layers if progress else 0)


def test_gradients_reach_the_input():
    model, x, y = network(), images().requires_grad_(), images().requires_grad_()
    deploy(model)(x).square().sum().backward()
    model(y).square().sum().backward()
    agree(x.grad, y.grad)


def test_channels_last_and_slices_of_batches():
    model = network("dgc_resnet18")
    deployed = deploy(model)
    with torch.no_grad():
        agree(deployed(images().contiguous(memory_format=torch.channels_last)), model(images()))
        layer = next(module for module in model.modules() if isinstance(module, DynamicGroupConv2d))
        one, wide = deploy(nn.Sequential(layer)), torch.randn(3, 100, 8, 8)
        agree(one(wide[:, :64]), layer(wide[:, :64]))
        agree(one(wide.transpose(2, 3)[:, :64]), layer(wide.transpose(2, 3)[:, :64]))


@pytest.mark.parametrize("groups, width", [(2, 4), (4, 3), (8, 1)])
@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 1, 1), (1, 0, 2)])
def test_group_convolutions(groups, width, stride, padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, groups * width, 3, stride, padding, dilation, groups).eval()
    deployed = deploy(nn.Sequential(conv))
    assert isinstance(deployed[0], DeployedGroupConv2d)
    wide = torch.randn(3, 20, 9, 8)
    with torch.no_grad():
        for x in (wide[:, :16].contiguous(), wide[:, 2:18], torch.randn(0, 16, 9, 8)):
            y = conv(x)
            torch.testing.assert_close(deployed(x), y, rtol=1e-5, atol=1e-5)
            out = torch.full((len(y), y.shape[1] + 3, *y.shape[2:]), 7.0)
            deployed[0](x, out[:, 1:-2])
            torch.testing.assert_close(out[:, 1:-2], y, rtol=1e-5, atol=1e-5)
            assert (out[:, 0] == 7).all() and (out[:, -2:] == 7).all()


def test_ties_are_dropped_in_exports_too():
    torch.manual_seed(0)
    layer = DynamicGroupConv2d(24, 12, 1, heads=3, preact=False).eval()
    with torch.no_grad():
        layer.gates.excite.zero_()
        layer.gates.bias.copy_(torch.arange(24) // 5)
        x = torch.randn(2, 24, 4, 4)
        for inactive in (1, 5, 7, 22, 23, 24):
            layer.inactive_channels.fill_(inactive)
            program = torch.export.export(deploy(nn.Sequential(layer)), (x,))
            torch.testing.assert_close(program.module()(x), layer(x))


@needs_compiler
@pytest.mark.parametrize("case", ["ties", "nothing dropped", "all dropped", "nan", "infinity"])
def test_gates_of_the_kernel(case):
    """The layer whole, as the definition has it, where selection is not plain."""
    torch.manual_seed(0)
    batch, channels, heads, hidden = 3, 21, 2, 5
    x, weight = torch.randn(batch, channels, 5, 6), torch.randn(8, channels, 3, 3)
    squeeze, excite = torch.randn(heads, hidden, channels), torch.randn(heads, channels, hidden)
    bias, inactive = torch.rand(heads, channels), torch.tensor(9)
    if case == "ties":
        excite[:], bias[:] = 0, torch.arange(channels) // 4
    elif case == "nothing dropped":
        inactive = torch.tensor(0)
    elif case == "all dropped":
        inactive = torch.tensor(channels)
    else:
        x[1, 4, 2, 3] = float("nan") if case == "nan" else float("inf")
    arguments = x, None, None, squeeze, excite, bias, inactive, weight, None, False, (1, 1), (1, 1), (1, 1)
    packed = pack(weight, squeeze, excite, (1, 1), (1, 1))
    assert cpu.takes_layer(x, packed[0])
    ours, theirs = gated_layer(*arguments, packed, channels - int(inactive)), plain(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_every_selection_of_the_kernel():
    torch.manual_seed(0)
    for channels in (1, 7, 64, 100):
        for inactive in range(channels + 1):
            layer = DynamicGroupConv2d(channels, 8, 1, heads=2, squeeze_rate=2, preact=False).eval()
            layer.inactive_channels.fill_(inactive)
            x = torch.rand(2, channels, 3, 4)
            with torch.no_grad():
                torch.testing.assert_close(deploy(nn.Sequential(layer))(x), layer(x), rtol=1e-4, atol=1e-4)


def test_the_kept_channels_operations_are_counted():
    model = network()
    deployed = deploy(model)

    def flops(module):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(images(1))
        return counter.get_total_flops()

    whole, ours = flops(network(progress=0.0)), flops(deployed)
    assert ours < 0.7 * whole
    assert abs(ours - flops(model)) < 0.03 * ours  # the gates' own products aside, and gates that are zero anyway


def test_without_a_compiler_it_works_all_the_same(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    model = network()
    with torch.no_grad():
        agree(deploy(model)(images()), model(images()))
