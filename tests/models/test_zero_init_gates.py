"""Networks that start as their dense baselines do: gates of one, whatever the image."""

import pytest
import timm
import torch
import torch.nn.functional as F

from dgc_fastai import DynamicGroupConv2d, convert, dgc_learner, gate_penalty, load_recipe, set_progress
from dgc_fastai.layers.dynamic_group_conv import GATE_STEP
from dgc_fastai.layers.gate_schedule import dgc_layers
from helpers import ROOT
from helpers.golden import close, loaders

SMALL = {
    "dgc_densenet22": dict(stages=(2, 2), growth=(8, 8)),
    "dgc_mobilenetv2_100": {},
    "dgc_resnet18": dict(preact=False),
    "dgc_resnet50": dict(preact=False, layers=(1, 1, 1, 1)),
}


def zero_init(name, **keywords):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, zero_init_gates=True, **SMALL[name] | keywords)


@pytest.mark.parametrize("name", SMALL)
def test_gates_start_at_one_for_every_image_and_all_differ(name):
    for layer in dgc_layers(zero_init(name)):
        gates = layer.gates(10 * torch.rand(3, layer.in_channels))
        close(gates, torch.ones_like(gates), GATE_STEP * layer.in_channels)
        assert torch.equal(gates[0], gates[2])
        # Equal gates would be dropped together; the smallest filters go first.
        assert all(len(row.unique()) == layer.in_channels for row in gates[0])
        filters = layer.weight.detach().unflatten(0, (-1, layer.heads)).flatten(3).square().sum((0, 3))
        assert torch.equal(gates[0].argmin(-1), filters.argmin(-1))


def test_converted_layers_of_any_width_have_no_equal_gates():
    model = convert(torch.nn.Sequential(torch.nn.Conv2d(2048, 8, 1)), input_size=(2048, 4, 4))
    assert all(len(row.unique()) == 2048 for row in model[0].gates.bias)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", SMALL)
def test_a_new_network_computes_what_its_dense_baseline_does(name, training):
    keywords = {key: value for key, value in SMALL[name].items() if key != "preact"}
    model, dense = zero_init(name), timm.create_model(f"{name}_dense", num_classes=7, **keywords)
    pairs = [
        [module for module in network.modules() if isinstance(module, kinds)]
        for kinds in ((torch.nn.Conv2d, DynamicGroupConv2d), (torch.nn.BatchNorm2d,))
        for network in (model, dense)
    ]
    for mine, other in zip(*pairs[:2], strict=True):
        # With the fan-out of one head, the ratio of the deviations would be 2.
        assert float(mine.weight.detach().std() / other.weight.detach().std()) == pytest.approx(1, rel=0.4)
        other.weight.data.copy_(mine.weight.data)
    for mine, other in zip(*pairs[2:], strict=True):
        other.load_state_dict(mine.state_dict())
    dense.get_classifier().load_state_dict(model.get_classifier().state_dict())
    images = torch.randn(4, 3, 64, 64)
    close(model.train(training)(images), dense.train(training)(images), 1e-3)


@pytest.mark.parametrize("name", [*SMALL, "dgc_resnet18_dense"])
def test_dgc_learner_starts_so_and_can_be_told_otherwise(name):
    dls = loaders(torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long), 4)
    keywords = dict(normalize=False, loss_func=F.cross_entropy)
    layers = dgc_layers(dgc_learner(dls, name, **keywords).model)
    assert bool(layers) != name.endswith("_dense")
    assert not any(layer.gates.excite.any() or (layer.preact and "resnet" in name) for layer in layers if layer)
    published = dgc_learner(dls, name, zero_init_gates=False, **keywords).model
    assert all(layer.gates.excite.all() for layer in dgc_layers(published))


def test_the_recipe_for_pictures_starts_so_and_published_ones_do_not():
    model = load_recipe(ROOT / "recipes/pictures_resnet18.yaml").model
    assert model.zero_init_gates and model.preact is False
    for name in ("cifar10_densenet86", "cifar100_densenet86", "imagenet_condensenet", "imagenet_r18"):
        model = load_recipe(ROOT / f"recipes/{name}.yaml").model
        assert model.zero_init_gates is None and model.preact is None


def test_one_image_does_not_drown_the_others():
    """Random gates grow with the energy of an image. Batch norm then divides by that of the strongest one."""

    def dominance(**keywords):
        torch.manual_seed(0)
        model = timm.create_model("dgc_resnet18", channels=(16, 16, 32, 32), num_classes=7, **keywords)
        energies = []
        for layer in dgc_layers(model):
            layer.register_forward_pre_hook(lambda _, args: energies.append(args[0].square().mean((1, 2, 3)).sqrt()))
        contrast = torch.linspace(0.5, 1.5, 16).reshape(-1, 1, 1, 1)
        with torch.no_grad():
            model.train()(contrast * torch.randn(16, 3, 64, 64))
        return float(energies[-1].max() / energies[-1].median())

    assert dominance(zero_init_gates=True, preact=False) < 2 < 6 < dominance()


def test_a_small_set_is_learned_and_evaluation_stays_finite():
    model = zero_init("dgc_resnet18", channels=(16, 16, 32, 32), heads=2, gate_factor=0.5)
    classes = torch.arange(32) % 2
    waves = torch.stack([torch.sin(torch.arange(32.0)), torch.cos(0.3 * torch.arange(32.0))])
    images = torch.randn(32, 3, 32, 32) + waves[classes][:, None, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        set_progress(model, step / 40)
        loss = F.cross_entropy(model.train()(images), classes) + 1e-5 * gate_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            assert model.eval()(images).isfinite().all()
    assert (model(images).argmax(1) == classes).float().mean() > 0.9
