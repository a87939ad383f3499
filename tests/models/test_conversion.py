"""convert: the network computes what it did before, keeps what should be kept, and trains on."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

from dgc_fastai import DynamicGroupConv2d, budget, convert, gate_penalty, set_progress
from dgc_fastai.layers.dynamic_group_conv import GATE_STEP
from dgc_fastai.layers.gate_schedule import dgc_layers
from helpers.golden import close, equal_states, evaluating

# Nobody picked these: of timm 1.0.31's 424 networks under 60 M parameters that are made of convolutions, norms and at
# most three linear layers, every tenth in timm's order, and of those 43 the ten with the fewest operations.
EVERY_TENTH = [
    "ghostnetv3_100",
    "lcnetv2_small",
    "mixnet_m",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "regnety_006",
    "repghostnet_058",
    "tf_efficientnet_lite1",
    "tf_mixnet_l",
    "tinynet_b",
]


@pytest.mark.parametrize("name", EVERY_TENTH)
def test_networks_that_nobody_picked(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} does not have it yet")
    x, target = torch.randn(4, 3, 64, 64), torch.arange(4)
    model = timm.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        expected = model(x)
        close(convert(model)(x), expected, 1e-4)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.003, momentum=0.9)
    losses = []
    for step in range(10):  # the first of a hundred
        set_progress(model, step / 100)
        loss = F.cross_entropy(model(x), target) + 1e-5 * gate_penalty(model)
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for layer in dgc_layers(model):
        assert layer.gates.excite.grad.any() and layer.weight.grad.any()


def test_convolutions_that_do_more_than_convolve_are_refused():
    with pytest.raises(ValueError, match="NormFreeNet has no convolution to convert .stem.conv: a ScaledStdConv2d"):
        convert(timm.create_model("nf_seresnet26"))


def plain(channels=8, **kwargs):
    """A network whose middle convolution is the one in question."""
    conv = torch.nn.Conv2d(channels, kwargs.pop("out", 8), kwargs.pop("kernel_size", 3), **kwargs)
    return torch.nn.Sequential(torch.nn.Conv2d(3, channels, 3), torch.nn.Tanh(), conv)


@pytest.mark.parametrize("make", [torchvision.models.vgg11_bn, torchvision.models.mobilenet_v2])
def test_torchvision_networks_compute_what_they_did(make):
    x = torch.randn(2, 3, 64, 64)
    model = evaluating(make(num_classes=7), x)
    with torch.no_grad():
        expected = model(x)
        parameters = {id(p) for p in model.parameters()}
        assert convert(model) is model
        close(model(x), expected, 1e-4)
    assert parameters <= {id(p) for p in model.parameters()}
    assert len(dgc_layers(model)) > 5
    assert all((layer.gates.bias - 1).abs().max() <= GATE_STEP * layer.in_channels / 2 for layer in dgc_layers(model))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(bias=True),
        dict(bias=False, stride=2, padding=1),
        dict(kernel_size=1, stride=(2, 1), out=12),
        dict(kernel_size=(1, 5), padding=(0, 2), dilation=(1, 2)),
        dict(channels=96, kernel_size=1, out=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [1, 4])
def test_every_geometry(arguments, heads):
    model = plain(**arguments).double().eval()
    x = torch.randn(2, 3, 20, 21, dtype=torch.double)
    with torch.no_grad():
        expected = model(x)
        convert(model, heads=heads, gate_factor=0.5, input_size=(3, 20, 21))
        (layer,) = dgc_layers(model)
        assert (layer.heads, layer.gate_factor, layer.preact, layer.training) == (heads, 0.5, False, False)
        assert layer.weight.dtype == torch.double
        close(model(x), expected, 1e-4)


def test_what_is_left_and_why(caplog):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 16, 3)
            self.narrow = torch.nn.Conv2d(16, 4, 1)
            self.few = torch.nn.Conv2d(4, 16, 1)
            self.depthwise = torch.nn.Conv2d(16, 16, 3, groups=16)
            self.odd = torch.nn.Conv2d(16, 18, 1)
            self.back = torch.nn.Conv2d(18, 16, 1)
            self.circular = torch.nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
            self.same = torch.nn.Conv2d(16, 16, 3, padding="same")
            self.hooked = torch.nn.Conv2d(16, 16, 1)
            self.hooked.register_forward_hook(lambda *_: None)
            self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(16, 16, 1))
            self.functional = torch.nn.Conv2d(16, 16, 1)
            self.asked = torch.nn.Conv2d(16, 16, 1)
            self.squeeze = torch.nn.Conv2d(16, 16, 1)
            self.last = torch.nn.Conv2d(16, 16, 1)

        def forward(self, x):
            x = self.odd(self.depthwise(self.few(self.narrow(self.stem(x)))))
            x = self.normed(self.hooked(self.same(self.circular(self.back(x)))))
            x = self.asked(F.conv2d(x, self.functional.weight))
            return self.last(x * self.squeeze(x.mean((2, 3), keepdim=True)))

    model = Whole()
    with caplog.at_level(logging.INFO, "dgc_fastai"):
        convert(model, skip="as*")
    assert {name for name, module in model.named_modules() if isinstance(module, DynamicGroupConv2d)} == {
        "narrow", "back", "last",
    }  # fmt: skip
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "converted 3 of 14 convolutions"
    for line, (name, reason) in zip(
        lines[1:],
        {
            "stem": "3 input channels are too few",
            "few": "4 input channels are too few",
            "depthwise": "it has 16 groups",
            "odd": "heads=4 does not divide its 18 output channels",
            "circular": "padding",
            "same": "padding",
            "hooked": "hooks",
            "normed": "ParametrizedConv2d",
            "functional": "not called as a module",
            "asked": "skipped",
            "squeeze": "a single pixel",
        }.items(),
    ):
        assert line.startswith(f"left {name}: ") and reason in line


def test_each_convolution_has_a_gate_factor_of_its_own(caplog):
    model = timm.create_model("resnet10t", num_classes=7)
    with caplog.at_level(logging.INFO, "dgc_fastai"):
        convert(model, gate_factor={"layer1.*": 1, "layer2.0.conv1": 0.75, "layer*": 0.25, "conv1.*": 0.5})
    layers = {name: one.gate_factor for name, one in model.named_modules() if isinstance(one, DynamicGroupConv2d)}
    assert not any(name.startswith("layer1") for name in layers) and layers.pop("layer2.0.conv1") == 0.75
    assert {name: factor for name, factor in layers.items() if name.startswith("conv1")} == {
        "conv1.3": 0.5, "conv1.6": 0.5,
    }  # fmt: skip
    assert {factor for name, factor in layers.items() if name.startswith("layer")} == {0.25}
    assert "left layer1.0.conv1: its gate factor is 1" in [record.getMessage() for record in caplog.records]
    set_progress(model, 1)
    assert int(model.layer2[0].conv1.inactive_channels) == 16 and int(model.layer2[0].conv2.inactive_channels) == 96


@pytest.mark.parametrize(
    "gate_factor, message",
    [
        ({"layer1.*": 0.5}, "gate_factor has none for conv1.3; add one for '[*]', all others"),
        ({"layr1.0.conv1": 0.5, "*": 1}, "no convolution is called 'layr1.0.conv1'; did you mean 'layer1.0.conv1'"),
        ({"*": 1.5}, "gate_factor=1.5 is not in"),
        ({"*": 1}, "no convolution to convert .conv1.0: 3 input.* its gate factor is 1"),
    ],
)
def test_gate_factors_that_miss_a_convolution_are_refused(gate_factor, message):
    model = timm.create_model("resnet10t")
    with pytest.raises(ValueError, match=message):
        convert(model, gate_factor=gate_factor)
    assert not dgc_layers(model)


def test_what_cannot_be_converted_is_refused_and_left_alone():
    transformer = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(ValueError, match="VisionTransformer has no convolution to convert .patch_embed.proj: 3 input"):
        convert(transformer)
    with pytest.raises(ValueError, match=r"cannot take images of \(3, 32, 32\)"):
        convert(timm.create_model("vit_tiny_patch16_224", depth=1), input_size=(3, 32, 32))
    with pytest.raises(ValueError, match="^Linear has no convolution to convert$"):
        convert(torch.nn.Linear(224, 2))
    for wrong in (dict(heads=0), dict(squeeze_rate=1), dict(gate_factor=0), dict(skip="*")):
        model = plain()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError):
            convert(model, **wrong)
        assert equal_states(model.state_dict(), before)


def test_images_of_other_channels_than_the_configuration_s():
    model = timm.create_model("resnet10t", in_chans=1, num_classes=7)
    assert len(dgc_layers(convert(model))) == 13 and model(torch.randn(2, 1, 64, 64)).shape == (2, 7)


def test_a_shared_convolution_stays_shared():
    conv = torch.nn.Conv2d(8, 8, 3, padding=1)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), conv, torch.nn.ReLU(), conv)
    convert(model)
    assert isinstance(model[1], DynamicGroupConv2d) and model[1] is model[3]


def test_closing_the_gates_at_once_drops_the_smallest_filters():
    model = plain(channels=16, out=8)
    weight = model[2].weight.detach().clone()
    convert(model, heads=2, gate_factor=0.25)
    (layer,) = dgc_layers(model)
    set_progress(model, 1)
    x = torch.randn(3, 16, 9, 9)
    with torch.no_grad():
        gates = layer.gates(x.mean((2, 3)))
        dropped = gates <= gates.sort().values[..., 11:12]
        for head in range(2):
            sizes = weight[head::2].square().sum((0, 2, 3))
            assert torch.equal(dropped[:, head], (sizes < sizes.sort().values[12]).expand(3, 16))
            kept = weight[head::2] * (~dropped[0, head]).float().view(1, -1, 1, 1)
            close(layer(x)[:, head::2], F.conv2d(x, kept, model[2].bias[head::2]), 1e-4)


def test_a_converted_network_is_cheaper_and_scripts_compiles_and_copies():
    x = torch.randn(2, 3, 64, 64)
    model = evaluating(timm.create_model("resnet10t", num_classes=7), x)
    before = budget(model, 224)
    convert(model)
    after = budget(model, 224)
    assert before.macs == before.macs_dense == after.macs_dense
    assert after.macs < 0.5 * before.macs
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        close(torch.jit.script(model)(x), expected, 1e-5)
        close(torch.compile(model, backend="eager", fullgraph=True)(x), expected, 1e-5)
