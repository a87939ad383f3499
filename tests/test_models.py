"""The networks: sizes, dense twins, and timm's contract as far as a timm user leans on it daily."""

import copy

import pytest
import timm
import torch
from golden import close, evaluating, read_json

from dgc_fastai import DynamicGroupConv2d, gate_penalty, set_progress
from dgc_fastai.conv import dgc_layers

NAMES = ["dgc_condensenet74", "dgc_densenet86", "dgc_resnet18"]
TWINS = [f"{name}_dense" for name in NAMES]
# Small enough for every test, with each family's every kind of layer.
SMALL = {
    "dgc_densenet86": dict(stages=(1, 2, 1), growth=(4, 8, 8)),
    "dgc_condensenet74": dict(stages=(1, 2, 1), growth=(4, 8, 8)),
    "dgc_resnet18": dict(channels=(16, 16, 32, 32), layers=(1, 1, 2, 1)),
}


def small(name, **kwargs):
    return timm.create_model(name, **{**SMALL[name.removesuffix("_dense")], "num_classes": 7, **kwargs})


def test_the_networks_are_in_timm_s_registry():
    assert sorted(timm.list_models("dgc_*")) == sorted(NAMES + TWINS)


@pytest.mark.parametrize("name", NAMES + TWINS)
def test_default_configuration_is_true(name):
    model = timm.create_model(name).eval()
    cfg = model.default_cfg
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, *cfg["input_size"]))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.get_classifier().out_features == cfg["num_classes"] == model.num_classes


@pytest.mark.parametrize("name", NAMES + TWINS)
def test_timm_s_surface(name):
    x = torch.randn(2, 3, 64, 64)
    model = evaluating(small(name), x)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.isfinite().all()
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(final, features)
        assert [i.shape[1] for i in intermediates] == [f["num_chs"] for f in model.feature_info]
        assert [64 // i.shape[-1] for i in intermediates] == [f["reduction"] for f in model.feature_info]
        extractor = small(name, features_only=True, out_indices=(0, 2)).eval()
        assert [f.shape[1] for f in extractor(x)] == [model.feature_info[i]["num_chs"] for i in (0, 2)]
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)


@pytest.mark.parametrize("name", NAMES)
def test_every_keyword_of_the_method_reaches_every_layer(name):
    model = small(name, heads=2, squeeze_rate=8, gate_factor=0.5, in_chans=1, drop_rate=0.1)
    layers = dgc_layers(model)
    assert {(layer.heads, layer.squeeze_rate, layer.gate_factor) for layer in layers} == {(2, 8, 0.5)}
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_densenet_keywords():
    model = timm.create_model("dgc_densenet86", stages=(1, 3), growth=(8, 16), bottleneck=2, group_3x3=8)
    assert [(layer.in_channels, layer.out_channels) for layer in dgc_layers(model)] == [
        (16, 16), (24, 32), (40, 32), (56, 32),
    ]  # fmt: skip
    assert {m.groups for m in model.modules() if isinstance(m, torch.nn.Conv2d)} == {1, 8}
    with pytest.raises(ValueError, match="differ in length"):
        timm.create_model("dgc_densenet86", stages=(1, 2, 3), growth=(8, 8))
    with pytest.raises(ValueError, match="group_3x3=3"):
        timm.create_model("dgc_densenet86", group_3x3=3)
    with pytest.raises(ValueError, match="heads=3"):
        timm.create_model("dgc_resnet18", heads=3)


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_twin_differs_by_its_1x1_or_all_convolutions_only(name):
    gated, dense = small(name), small(f"{name}_dense", heads=2)
    assert dgc_layers(gated) and not dgc_layers(dense)
    shape = lambda model: {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 4}  # noqa: E731
    if "densenet" in name:  # norm-ReLU-convolution keeps its parts in a module of its own
        expected = {n.removesuffix(".conv.weight").removesuffix(".weight"): s for n, s in shape(dense).items()}
        assert {n.removesuffix(".conv.weight").removesuffix(".weight"): s for n, s in shape(gated).items()} == expected
    else:
        assert shape(gated) == shape(dense)


def test_the_dense_resnet_is_torchvision_s():
    from torchvision.models import resnet18

    ours, theirs = timm.create_model("dgc_resnet18_dense").eval(), resnet18().eval()
    assert ours.layer1[0].bn2.weight.min() == 1  # residual branches do not start at zero
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(ours(x), theirs(x), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_initialisation_of_a_whole_network_is_the_reference_s(name):
    for module in timm.create_model(name).modules():
        if isinstance(module, (torch.nn.Conv2d, DynamicGroupConv2d)) and module.weight.numel() > 4000:
            kh, kw = module.kernel_size
            out = module.out_channels // getattr(module, "heads", 1)
            assert abs(module.weight.std() / (2 / (kh * kw * out)) ** 0.5 - 1) < 0.1
        elif isinstance(module, torch.nn.Linear) and "densenet" in name:
            assert not module.bias.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("progress", [0, 0.5, 1])
def test_every_parameter_learns_with_and_without_checkpointing(name, progress):
    model = small(name)
    set_progress(model, progress)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = torch.randn(4, 3, 64, 64)
    for network in (model, twin):
        (network(x).square().sum() + gate_penalty(network)).backward()
    for (parameter_name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        assert parameter.grad is not None, parameter_name
        close(other.grad, parameter.grad, 1e-4)


@pytest.mark.parametrize("name", NAMES + TWINS)
def test_parameter_groups_cover_every_parameter(name):
    from timm.models import group_parameters

    model = small(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
        assert len(groups) > 3


@pytest.mark.parametrize("name", NAMES)
def test_scripted_traced_exported_and_compiled_models_agree(name):
    from timm.models._features_fx import create_feature_extractor

    x = torch.randn(2, 3, 64, 64)
    model = evaluating(small(name), x)
    set_progress(model, 1)
    with torch.no_grad():
        expected = model(x)
        close(torch.jit.script(model)(x), expected, 1e-5)
        graph = create_feature_extractor(model, [name_of_last_module(model)])
        close(next(iter(graph(x).values())), expected, 1e-5)
        close(torch.export.export(model, (x,)).module()(x), expected, 1e-5)


def name_of_last_module(model):
    return model.default_cfg["classifier"]


def test_annealing_does_not_recompile():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = small("dgc_densenet86")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 32, 32)
    for progress in (0, 0.2, 0.4, 0.9):
        set_progress(model, progress)
        compiled(x)
        assert gate_penalty(model) > 0
    assert counter.frame_count == 1


def test_published_sizes():
    for key, name, classes in [
        ("dydensenet_cifar10", "dgc_densenet86", 10),
        ("dydensenet_cifar100", "dgc_densenet86", 100),
        ("dydensenet_imagenet", "dgc_condensenet74", 1000),
        ("dyresnet18_imagenet", "dgc_resnet18", 1000),
    ]:
        model = timm.create_model(name, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == read_json("budgets.json")[key]["parameters"]
