"""Networks whose channels share gates in blocks: made, counted, saved, deployed, exported and looked at."""

import json

import pytest
import timm
import torch
import torch.nn as nn

from dgc_fastai import (
    CheckpointError,
    DynamicGroupConv2d,
    budget,
    convert,
    deploy,
    gate_statistics,
    load_checkpoint,
    load_recipe,
    replaced_gates,
    save_checkpoint,
    set_progress,
)
from dgc_fastai.inference.export import export
from dgc_fastai.inference.predict import Predictor
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.models.allocation import mac_options
from dgc_fastai.models.gate_counts import watched_gates
from dgc_fastai.utils.errors import RecipeError
from helpers import QUICKSTART
from helpers.networks import agree, images, network
from helpers.runs import start

NETWORKS = pytest.mark.parametrize(
    "name, keywords",
    [
        ("dgc_densenet22", dict(granularity=8)),
        ("dgc_resnet18", dict(granularity=32, layers=(1, 1, 1, 1))),
        ("dgc_resnet50", dict(granularity=16, preact=False)),
        ("dgc_mobilenetv2_100", dict(granularity=16, zero_init_gates=True)),
    ],
    ids=str,
)


@NETWORKS
def test_layers_have_the_largest_blocks_that_fit_and_deploy_keeps_the_numbers(name, keywords):
    model, x = network(name, **keywords), images(2)
    wanted = keywords["granularity"]
    for layer in dgc_layers(model):
        size = layer.granularity
        assert layer.in_channels % size == 0 and size <= wanted
        assert size == wanted or layer.in_channels % (2 * size)
        assert layer.gates.bias.shape == (4, layer.in_channels // size)
    with torch.no_grad(), watched_gates(model) as kept:
        expected = model(x)
        agree(deploy(model)(x), expected)
    for layer, gates in zip(dgc_layers(model), kept):
        by_block = gates.unflatten(2, (-1, layer.granularity))
        assert (by_block == by_block[..., :1]).all()


def test_a_network_without_the_keyword_is_one_of_single_channels():
    one, other = network(), network(granularity=1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="granularity=12 is not a power of two"):
        timm.create_model("dgc_densenet22", granularity=12)


def test_cost_by_hand():
    # 64 -> 128, 1x1 on 10 px; 2 heads squeeze to 64 // 4 = 16 and have 8 gates each; of 8 blocks 2 are kept.
    layer = DynamicGroupConv2d(64, 128, 1, heads=2, squeeze_rate=8, gate_factor=0.25, granularity=8, preact=False)
    gates = 2 * (64 * 16 + 16 * 8)
    for progress, kept in ((0, 64), (0.5, 64 - 8 * 4), (1, 16)):  # round(8 * 0.75 * 1.5 * 5 / 12) = 4
        set_progress(layer, progress)
        cost = budget(layer, (64, 10, 10))
        (row,) = cost.layers
        assert (row.macs, row.macs_now) == (16 * 128 * 100 + gates, kept * 128 * 100 + gates)
        assert row.macs_dense == 64 * 128 * 100
        assert cost.parameters == sum(one.numel() for one in layer.parameters())
        # Pooling; ReLUs of 16 hidden units and 8 gates, 8 biases, 64 products.
        assert cost.operations == 6400 + 2 * (16 + 8 + 8 + 64) + gates + 0.25 * 64 * 128 * 100


def test_what_a_layer_may_keep_costs_whole_blocks():
    layer = DynamicGroupConv2d(64, 128, 1, heads=2, squeeze_rate=8, gate_factor=0.25, granularity=8, preact=False)
    model = nn.Sequential(layer)
    (options,) = mac_options(model, budget(model, (64, 10, 10)))
    for kept in range(1, 8):  # blocks
        layer.gate_factor = options.gate_factor(kept)
        assert budget(model, (64, 10, 10)).macs == options.costs[kept]
    assert options.costs[-1] == 64 * 128 * 100


def test_weights_go_to_a_file_and_back_and_nowhere_else(tmp_path):
    model, x, path = network(granularity=8), images(2), tmp_path / "net.safetensors"
    save_checkpoint(model, path)
    loaded = load_checkpoint(network(granularity=8, progress=0), path)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    for other in (dict(), dict(granularity=4)):
        with pytest.raises(CheckpointError, match="of another shape"):
            load_checkpoint(network(**other), path)
    layer = dgc_layers(model)[0]
    layer.inactive_channels.fill_(3)
    save_checkpoint(model, path)
    with pytest.raises(CheckpointError, match="inactive_channels is 3, of 16 channels in blocks of 8"):
        load_checkpoint(network(granularity=8), path)


@pytest.mark.parametrize("granularity", [1, 8, 16])
def test_a_converted_network_computes_what_it_did(granularity):
    torch.manual_seed(0)
    model, x = timm.create_model("mobilenetv2_050", num_classes=5).eval(), images(2)
    with torch.no_grad():
        expected = model(x)
        converted = convert(model, granularity=granularity, gate_factor=0.5)
        agree(converted(x), expected, 2e-3)
    sizes = {layer.in_channels: layer.granularity for layer in dgc_layers(converted)}
    assert sizes[16] == granularity and sizes[96] == granularity and (granularity < 16 or 8 in sizes.values())
    set_progress(converted, 1)
    with torch.no_grad():
        agree(deploy(converted)(x), converted(x))


def test_conversion_refuses_what_is_no_power_of_two_before_it_changes_anything():
    model = timm.create_model("mobilenetv2_050")
    with pytest.raises(ValueError, match="granularity=6 is not a power of two"):
        convert(model, granularity=6)
    assert not dgc_layers(model)


def test_statistics_and_controls():
    model = network(granularity=8)
    x, labels = images(12, 32), torch.arange(12) % 5
    statistics = gate_statistics(model, [(x, labels)])
    for layer, own in zip(statistics.to_dict()["layers"], dgc_layers(model)):
        assert (layer["granularity"], layer["channels"]) == (8, own.in_channels)
        usage = torch.tensor(layer["usage"]).unflatten(1, (-1, 8))
        assert (usage == usage[..., :1]).all()
        assert layer["kept_share"] <= 1 - layer["inactive"] / layer["channels"] + 1e-5
    for kind in ("another_image", "mean", "input_free"):
        with replaced_gates(model, kind), torch.no_grad(), watched_gates(model) as kept:
            model(x)
        for gates, own in zip(kept, dgc_layers(model)):
            assert ((gates != 0).sum(2) <= own.in_channels - own.inactive_channels).all()


def test_a_recipe_trains_continues_predicts_and_is_exported(tmp_path, app):
    overrides = ["model.granularity=8", "train.epochs=2", f"output={tmp_path}"]
    folder, learner = start(overrides)
    assert [layer.granularity for layer in dgc_layers(learner.model)] == [8, 4, 8]
    predictor = Predictor.from_weights(folder)
    assert predictor.recipe.model.granularity == 8
    assert all(int(layer.inactive_channels) % layer.granularity == 0 for layer in dgc_layers(predictor.model))
    for suffix in ("pt2", "onnx"):
        if suffix == "onnx":
            pytest.importorskip("onnxscript")
            pytest.importorskip("onnxruntime")
        assert export(predictor, tmp_path / f"net.{suffix}") <= 1e-4
    app("gates", folder)
    layers = json.loads((folder / "gates" / "gates.json").read_text())["layers"]
    assert [layer["granularity"] for layer in layers] == [8, 4, 8]


@pytest.mark.parametrize("granularity, kernel", [(1, 1), (8, 1), (8, 3)])
def test_exported_layers_gather_whole_blocks(granularity, kernel):
    torch.manual_seed(0)
    layer = DynamicGroupConv2d(64, 24, kernel, padding=kernel // 2, granularity=granularity, gate_factor=0.4)
    set_progress(layer, 1)
    model, x = deploy(nn.Sequential(layer.eval())), torch.randn(3, 64, 6, 5)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with torch.no_grad():
        for batch in (x, torch.cat([x, x.flip(2)])):
            agree(program.module()(batch), layer(batch), 1e-5)
    assert ("topk" in str(program.graph)) == (kernel == 1)


@pytest.mark.parametrize("key", ["model.granularity=12", "model.granularity=0", "model.granularity=true"])
def test_a_recipe_refuses_other_sizes(key):
    with pytest.raises(RecipeError, match="model.granularity"):
        load_recipe(QUICKSTART, [key])


def test_a_recipe_converts_in_blocks():
    recipe = load_recipe(QUICKSTART, ["model={arch: dgc_resnet18_dense, convert: {granularity: 16}}"])
    assert recipe.model.convert.granularity == 16 and recipe.model.convert.keywords()["granularity"] == 16
    assert load_recipe(QUICKSTART).model.granularity is None
