"""The study of the gates: its variants do what they say, and its page shows what its table holds."""

import csv
import importlib.util
import sys

import pytest
import torch

from dgc_fastai.layers.dynamic_group_conv import DynamicGroupConv2d
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.models.gate_counts import watched_gates
from helpers import ROOT


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_of_gates", ROOT / "recipes/study/gates.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = DynamicGroupConv2d(32, 16, 1, heads=4, gate_factor=0.25)
    layer.gates.bias.data += torch.rand(4, 32)  # no ties
    layer.inactive_channels.fill_(24)
    return layer.train()


def kept(layer, x):
    with watched_gates(layer) as gates:
        y = layer(x)
    return gates[0], y


def test_gates_without_a_part_replaced_are_the_layers_own(study, layer):
    x = torch.randn(6, 32, 5, 5)
    expected, y = kept(layer, x)
    layer.gates = study.StudiedGates(layer)
    gates, same = kept(layer, x)
    torch.testing.assert_close(gates, expected)
    torch.testing.assert_close(same, y)


@pytest.mark.parametrize(
    "parts, is_fixed", [({"scores": "bias"}, True), ({"scores": "random"}, True), ({"scores": "contribution"}, False)]
)
def test_a_fixed_selection_scales_by_image_but_keeps_the_same_channels(study, layer, parts, is_fixed):
    layer.gates = study.StudiedGates(layer, **parts)
    gates, _ = kept(layer, torch.randn(6, 32, 5, 5))
    mask = gates > 0
    assert (mask.sum(-1) <= 8).all()
    assert (mask.any(0).sum(-1) <= 8).all() == is_fixed
    assert (gates.amax(0) - gates.amin(0)).max() > 0.01


def test_input_free_gates_are_those_of_every_image_and_learn(study, layer):
    layer.gates = study.StudiedGates(layer, input_free=True)
    gates, y = kept(layer, torch.randn(6, 32, 5, 5))
    assert (gates == gates[:1]).all() and (gates > 0).sum() == 6 * 4 * 8
    y.square().sum().backward()
    assert layer.gates.bias.grad.abs().sum() > 0


def test_blocks_close_by_the_schedule_of_blocks(study):
    variant = study.VARIANTS["blocks_of_8"]
    model = study.build(variant, 5)
    study.set_gates(model, variant, 1)
    assert {layer.granularity for layer in dgc_layers(model)} == {8}
    for layer in dgc_layers(model):
        blocks = layer.in_channels // 8
        assert int(layer.inactive_channels) == 8 * min(round(0.75 * blocks), blocks - 1)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (260, 32, 32), generator=generator, dtype=torch.uint8)
    part = pictures, torch.arange(260) % 5
    return {"train": part, "val": part, "test": part}


@pytest.mark.parametrize("name", ["shallower", "open", "entropy_loss", "ema"])
def test_a_variant_trains_and_ends_closed_and_the_same_again(study, data, tmp_path, name):
    variant = study.VARIANTS[name]
    model, loss = study.train(variant, 0, 1, 0.01, data, tmp_path)
    _, again = study.train(variant, 0, 1, 0.01, data, tmp_path)
    assert loss == again
    for layer in dgc_layers(model):
        assert int(layer.inactive_channels) == round(layer.in_channels * 0.75)
    found = study.measure(model, data)
    assert set(found) <= set(study.COLUMNS) and 0 <= found["val"] <= 100


def test_a_dense_start_is_the_dense_network(study, data, tmp_path):
    dense = study.build(study.VARIANTS["dense"], 5)
    for module in dense.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    gated = study.build(study.VARIANTS["dense_first"], 5)
    study.load_start(gated, dense.state_dict())
    x = torch.randn(3, 1, study.SIZE, study.SIZE)
    with torch.no_grad():
        torch.testing.assert_close(gated.eval()(x), dense.eval()(x), rtol=1e-4, atol=1e-4)


def test_the_page_shows_the_table(study):
    with open(ROOT / "docs/study/gates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs/study.md").read_text()
    assert rows and study.markdown(rows) in page
