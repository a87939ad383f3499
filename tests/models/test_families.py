"""Each family's keywords, sizes, initialization and baselines."""

import re

import pytest
import timm
import torch

from dgc_fastai import DynamicGroupConv2d
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.layers.group_conv import GroupConv2d, StaticGroupConv2d
from helpers.families import NAMES, small
from helpers.golden import close, read_json


@pytest.mark.parametrize("name", NAMES)
def test_every_keyword_of_the_method_reaches_every_layer(name):
    model = small(name, heads=2, squeeze_rate=8, gate_factor=0.5, in_chans=1, drop_rate=0.1)
    layers = dgc_layers(model)
    assert {(layer.heads, layer.squeeze_rate, layer.gate_factor) for layer in layers} == {(2, 8, 0.5)}
    assert {layer.preact for layer in layers} == {"mobilenet" not in name}  # its bottlenecks are linear
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_densenet_keywords():
    model = timm.create_model("dgc_densenet86", stages=(1, 3), growth=(8, 16), bottleneck=2, group_3x3=8)
    assert [(layer.in_channels, layer.out_channels) for layer in dgc_layers(model)] == [
        (16, 16), (24, 32), (40, 32), (56, 32),
    ]  # fmt: skip
    assert {m.groups for m in model.modules() if isinstance(m, torch.nn.Conv2d)} == {1, 8}
    features = timm.create_model("dgc_densenet22", stages=(1, 1, 1, 2), growth=(4, 4, 4, 8), features_only=True)
    assert [f.shape[-1] for f in features(torch.randn(2, 3, 32, 32))] == [32, 16, 8, 4]
    with pytest.raises(ValueError, match="differ in length"):
        timm.create_model("dgc_densenet86", stages=(1, 2, 3), growth=(8, 8))
    with pytest.raises(ValueError, match="group_3x3=3"):
        timm.create_model("dgc_densenet86", group_3x3=3)
    for name in ("dgc_densenet22", "dgc_resnet18", "dgc_mobilenetv2_100"):
        with pytest.raises(ValueError, match="connection='sparse' is none of dgc, dense, sgc"):
            timm.create_model(name, connection="sparse")
    for name in ("dgc_resnet18", "dgc_resnet18_sgc", "dgc_densenet86_sgc"):
        with pytest.raises(ValueError, match="heads=3"):
            timm.create_model(name, heads=3)


@pytest.mark.parametrize("name", NAMES)
def test_baselines_differ_by_their_convolutions_only(name):
    gated, dense, static = small(name), small(f"{name}_dense", heads=2), small(f"{name}_sgc", heads=2)
    assert dgc_layers(gated) and not dgc_layers(dense) and not dgc_layers(static)

    def filters(model):  # by the place they have in the network, whatever holds them there
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.ndim == 4}
        held = re.compile(r"(\.conv)?(\.0)?\.weight$" if model is static else r"(\.conv)?\.weight$")
        return {held.sub("", name): shape for name, shape in shapes.items()}

    assert filters(gated) == filters(dense)
    replaced = {n for n, module in gated.named_modules() if isinstance(module, DynamicGroupConv2d)}
    grouped = {
        place: (out, channels // 2 if place in replaced else channels, kh, kw)
        for place, (out, channels, kh, kw) in filters(dense).items()
    }
    assert filters(static) == grouped


def test_static_groups_are_interleaved_like_heads():
    # With gates of one, a DGC layer whose heads each ignore the other groups' channels is the group convolution.
    conv = torch.nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False)
    static = StaticGroupConv2d(conv, heads=4)
    layer = DynamicGroupConv2d(8, 12, 3, padding=1, stride=2, heads=4, squeeze_rate=4, preact=False)
    x = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        layer.gates.excite.zero_()
        layer.weight.zero_()
        for out in range(12):
            head, place = out % 4, out // 4
            layer.weight[out, 2 * head : 2 * head + 2] = static[0].weight[3 * head + place]
        close(layer(x), static(x), 1e-5)


def test_the_dense_resnet_is_torchvision_s():
    from torchvision.models import resnet18

    ours, theirs = timm.create_model("dgc_resnet18_dense").eval(), resnet18().eval()
    assert ours.layer1[0].bn2.weight.min() == 1  # residual branches do not start at zero
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(ours(x), theirs(x), 1e-5)


@pytest.mark.parametrize("name", ["dgc_condensenet74", "dgc_densenet86", "dgc_resnet18"])
def test_initialisation_of_a_whole_network_is_the_reference_s(name):
    for module in timm.create_model(name).modules():
        if isinstance(module, (torch.nn.Conv2d, DynamicGroupConv2d)) and module.weight.numel() > 4000:
            kh, kw = module.kernel_size
            out = module.out_channels // getattr(module, "heads", 1)
            assert abs(module.weight.std() / (2 / (kh * kw * out)) ** 0.5 - 1) < 0.1
        elif isinstance(module, torch.nn.Linear) and "densenet" in name:
            assert not module.bias.any()


@pytest.mark.parametrize("name", ["dgc_mobilenetv2_100", "dgc_resnet50"])
def test_baselines_of_timm_s_networks_start_as_timm_s(name):
    torch.manual_seed(0)
    dense = timm.create_model(f"{name}_dense")
    theirs = timm.create_model(name.removeprefix("dgc_"), **({} if "mobile" in name else {"zero_init_last": False}))
    assert dense.state_dict().keys() == theirs.state_dict().keys()
    static = timm.create_model(f"{name}_sgc")
    for network in (dense, static):
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
                kh, kw = module.kernel_size  # timm's fan-out: per group in its EfficientNets, whole in its ResNets
                out = module.out_channels // (module.groups if "mobile" in name else 1)
                assert abs(module.weight.std() / (2 / (kh * kw * out)) ** 0.5 - 1) < 0.1


def test_published_sizes():
    for key, name, classes in [
        ("dydensenet_cifar10", "dgc_densenet86", 10),
        ("dydensenet_cifar100", "dgc_densenet86", 100),
        ("dydensenet_imagenet", "dgc_condensenet74", 1000),
        ("dyresnet18_imagenet", "dgc_resnet18", 1000),
    ]:
        model = timm.create_model(name, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == read_json("budgets.json")[key]["parameters"]


def test_baselines_use_pytorch_s_convolutions_only():
    for name, ours in (("dgc_densenet22", True), ("dgc_densenet22_dense", False), ("dgc_densenet22_sgc", False)):
        modules = timm.create_model(name).modules()
        assert any(isinstance(module, GroupConv2d) for module in modules) == ours
