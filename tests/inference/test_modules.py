"""The modules that `deploy` puts in the place of layers: the same numbers as the layers, in every geometry and type."""

import pytest
import torch
import torch.nn as nn

from dgc_fastai import DynamicGroupConv2d, deploy
from dgc_fastai.inference.modules import DeployedConv2d, DeployedGroupConv2d, DeployedStem
from helpers.networks import agree

POOL = dict(kernel_size=3, stride=2, padding=1)


@pytest.mark.parametrize("changes", [{}, dict(bias=True), dict(preact=False), dict(bias=True, preact=False)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 0), (3, 2, 1), (3, 1, 2)], ids=lambda s: "kernel{}-stride{}-padding{}".format(*s)
)
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


def test_a_layer_by_itself():
    layer = DynamicGroupConv2d(8, 8, 3, padding=1).eval()
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        agree(deploy(layer)(x), layer(x))
    assert isinstance(deploy(layer), DeployedConv2d)


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


@pytest.mark.parametrize(
    "conv, pool, merged",
    [
        pytest.param(dict(kernel_size=7, stride=2, padding=3), POOL, True, id="as in a ResNet"),
        pytest.param(
            dict(kernel_size=(3, 5), padding=(0, 4), dilation=(2, 1), bias=False), POOL, True, id="not square"
        ),
        pytest.param(dict(kernel_size=3), {name: (n, n) for name, n in POOL.items()}, True, id="pairs"),
        pytest.param(dict(kernel_size=3, padding="same"), POOL, False, id="padding by name"),
        pytest.param(dict(kernel_size=3, groups=3), POOL, False, id="groups"),
        pytest.param(dict(kernel_size=3, padding=1, padding_mode="reflect"), POOL, False, id="reflected padding"),
        pytest.param(dict(kernel_size=3), POOL | dict(ceil_mode=True), False, id="rounded up"),
        pytest.param(dict(kernel_size=3), dict(kernel_size=2), False, id="other windows"),
    ],
)
def test_the_stem_of_a_network(conv, pool, merged):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 21, **conv), nn.BatchNorm2d(21), nn.ReLU(), nn.MaxPool2d(**pool)).eval()
    nn.init.uniform_(model[1].weight, -1.5, 1.5), nn.init.normal_(model[1].bias)
    deployed = deploy(model)
    assert isinstance(deployed[0], DeployedStem) == merged
    torch._dynamo.reset()
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


def test_every_selection_of_the_kernel():
    torch.manual_seed(0)
    for channels in (1, 7, 64, 100):
        for inactive in range(channels + 1):
            layer = DynamicGroupConv2d(channels, 8, 1, heads=2, squeeze_rate=2, preact=False).eval()
            layer.inactive_channels.fill_(inactive)
            x = torch.rand(2, channels, 3, 4)
            with torch.no_grad():
                torch.testing.assert_close(deploy(nn.Sequential(layer))(x), layer(x), rtol=1e-4, atol=1e-4)
