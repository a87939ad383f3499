"""The budget against the reference's counter, PyTorch's own FLOP counter and arithmetic by hand."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from dgc_fastai import DynamicGroupConv2d, budget, set_progress
from helpers.golden import read_json

PUBLISHED = {
    "dydensenet_cifar10": ("dgc_densenet86", 10),
    "dydensenet_cifar100": ("dgc_densenet86", 100),
    "dydensenet_imagenet": ("dgc_condensenet74", 1000),
    "dyresnet18_imagenet": ("dgc_resnet18", 1000),
}


@pytest.mark.parametrize("key", PUBLISHED)
def test_operations_and_parameters_are_the_published_ones(key):
    golden = read_json("budgets.json")[key]
    name, classes = PUBLISHED[key]
    cost = budget(timm.create_model(name, num_classes=classes), golden["size"])
    assert cost.operations == pytest.approx(golden["operations"], rel=1e-12)
    assert cost.parameters == golden["parameters"]


@pytest.mark.parametrize("name", ["dgc_densenet86", "dgc_resnet18", "dgc_condensenet74"])
def test_dense_count_agrees_with_pytorch_s_counter(name):
    model, dense = timm.create_model(name), timm.create_model(f"{name}_dense").eval()
    size = model.default_cfg["input_size"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(torch.empty(1, *size))
    assert budget(dense, size).macs_dense == counter.get_total_flops() / 2
    assert budget(model, size).macs_dense == budget(dense, size).macs == budget(dense, size).macs_now


def test_one_layer_by_hand():
    # 64 -> 128, 3x3, stride 2 on 10 px: 25 outputs; 2 heads squeeze to 64 // 4 = 16; a half is kept.
    layer = DynamicGroupConv2d(64, 128, 3, stride=2, padding=1, heads=2, squeeze_rate=8, gate_factor=0.5)
    gates = 2 * (64 * 16 + 16 * 64)
    for progress, kept in ((0, 64), (0.5, 64 - 20), (1, 32)):
        set_progress(layer, progress)
        (row,) = budget(layer, (64, 10, 10)).layers
        assert row.macs == 32 * 9 * 128 * 25 + gates
        assert row.macs_now == kept * 9 * 128 * 25 + gates
        assert row.macs_dense == 64 * 9 * 128 * 25
        assert row.output == (128, 5, 5)
        assert row.parameters == sum(p.numel() for p in layer.parameters())


def test_operations_of_a_layer_without_norm_and_relu_by_hand():
    # 8 -> 4, 1x1 on 3 px, one head with one hidden unit: pooling reads 72 values; 1 + 8 + 8 + 8 for the gate's ReLUs,
    # bias and product, 16 for its linear layers; half of 8 channels for 4 outputs at 9 places.
    layers = [
        DynamicGroupConv2d(8, 4, 1, heads=1, gate_factor=0.5, bias=bias, preact=preact)
        for bias, preact in ((False, False), (True, False), (False, True))
    ]
    without, biased, with_relu = (budget(layer, (8, 3, 3)) for layer in layers)
    assert without.operations == biased.operations == 72 + 25 + 16 + 4 * 4 * 9
    assert with_relu.operations == without.operations + 72
    assert without.macs == with_relu.macs
    assert (biased.parameters, with_relu.parameters) == (without.parameters + 4, without.parameters + 16)


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_the_type_of_the_weights_does_not_matter(dtype):
    model = timm.create_model("dgc_densenet22")
    assert budget(model.to(dtype), 32) == budget(timm.create_model("dgc_densenet22"), 32)


def test_totals_are_the_sums_and_the_model_is_left_alone():
    model = timm.create_model("dgc_densenet86", stages=(2, 2), growth=(8, 16), num_classes=10, in_chans=1).train()
    model(torch.randn(2, 1, 16, 16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost = budget(model, (1, 16, 16))
    assert cost.macs == sum(layer.macs for layer in cost.layers) < cost.macs_now
    assert [layer.name for layer in cost.layers][:2] == ["stem", "stages.0.layers.0.conv1"]
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_image_too_small_or_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="cannot take images"):
        budget(timm.create_model("dgc_densenet86"), (1, 32, 32))
    with pytest.raises(ValueError, match="cannot take images"):
        budget(timm.create_model("dgc_densenet86"), 2)
