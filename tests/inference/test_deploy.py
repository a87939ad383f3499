"""`deploy`: the same numbers as the network, on every path, and the state of a module that can be saved and loaded."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_model, save_model
from torch.utils.flop_counter import FlopCounterMode

from dgc_fastai import DynamicGroupConv2d, convert, deploy
from dgc_fastai.inference.modules import DeployedConv2d
from dgc_fastai.ops import kernel
from dgc_fastai.ops.layer import gated_layer, gated_layer_definition
from dgc_fastai.ops.packed_layer import GateWeights, PackedLayer
from helpers.networks import SMALL, agree, images, network
from helpers.operators import needs_compiler


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


@pytest.mark.parametrize("name", ["dgc_densenet22", "dgc_resnet18"])
def test_saved_and_loaded(name, tmp_path):
    trained, new = network(name), network(name, progress=0.0)
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
                module.packed.packed.weight.zero_()
        assert torch.equal(copied(images()), expected)


@pytest.mark.parametrize("name", SMALL)
def test_pickled_and_restored(name):
    deployed = deploy(network(name))
    restored = pickle.loads(pickle.dumps(deployed))
    with torch.no_grad():
        assert torch.equal(restored(images()), deployed(images()))
    assert restored.state_dict().keys() == deployed.state_dict().keys()


@pytest.mark.parametrize("name", SMALL)
def test_deployed_again(name):
    deployed = deploy(network(name))
    with torch.no_grad():
        assert torch.equal(deploy(deployed)(images()), deployed(images()))


@pytest.mark.parametrize("name", ["dgc_densenet22", "dgc_resnet18"])
def test_compiled_as_one_graph(name):
    model = network(name)
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


@pytest.mark.parametrize("name", ["dgc_densenet22", "dgc_resnet18"])
def test_gradients_reach_the_input(name):
    model, x, y = network(name), images().requires_grad_(), images().requires_grad_()
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
    gates = GateWeights(squeeze, excite, bias, inactive)
    layer = PackedLayer(weight, None, heads, (1, 1), (1, 1), (1, 1), gates=gates)
    assert layer.is_supported(x)
    ours, theirs = gated_layer(x, layer), gated_layer_definition(x, layer)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


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
    monkeypatch.setattr(kernel, "library", lambda: None)
    model = network()
    with torch.no_grad():
        agree(deploy(model)(images()), model(images()))
