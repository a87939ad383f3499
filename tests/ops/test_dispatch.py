"""The operators of layers in inference: what sees them, and what autocast makes of them."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from dgc_fastai import DynamicGroupConv2d, deploy
from dgc_fastai.ops import kernel
from dgc_fastai.ops.dense import group_conv2d, stem
from dgc_fastai.ops.layer import gated_layer
from dgc_fastai.ops.packed_layer import GateWeights, PackedLayer
from helpers.operators import needs_compiler

ONE = (1, 1)
OPERATORS = {"gated_layer": gated_layer, "group_conv2d": group_conv2d, "stem": stem}


def layer_for(name):
    if name != "gated_layer":
        groups = 2 if name == "group_conv2d" else 1
        return PackedLayer(torch.randn(8, 4 // groups, 3, 3), torch.randn(8), groups, ONE, ONE, ONE)
    gates = GateWeights(
        torch.rand(2, 3, 4), 1e-6 * torch.rand(2, 4, 3), torch.linspace(1, 1.0005, 4).repeat(2, 1), torch.tensor(2)
    )
    norm = torch.rand(4) + 0.5, torch.randn(4)
    return PackedLayer(torch.randn(8, 4, 3, 3), torch.randn(8), 2, ONE, ONE, ONE, True, *norm, gates)


@pytest.fixture(params=["kernel", "no kernel"])
def maybe_kernel(request, monkeypatch):
    if request.param == "no kernel":
        monkeypatch.setattr(kernel, "library", lambda: None)
    elif kernel.library() is None:
        pytest.skip("there is no C++ compiler here")
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounded", [False, True], ids=["float32 input", "rounded input"])
def test_autocast_casts_the_input_and_the_layer_follows(maybe_kernel, name, dtype, rounded):
    operator, layer, x = OPERATORS[name], layer_for(name), torch.randn(2, 4, 9, 7)
    expected = operator(x, layer)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        for call in (operator, compiled):
            y = call(x.to(dtype) if rounded else x, layer)
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_leaves_float64_alone(maybe_kernel, name):
    operator, layer, x = OPERATORS[name], layer_for(name), torch.randn(2, 4, 9, 7)
    *tensors, packed = layer.__reduce__()[1]
    doubled = [part.double() if isinstance(part, torch.Tensor) else part for part in tensors]
    layer = PackedLayer(*doubled, packed and GateWeights(*(part.double() for part in packed[:3]), packed[3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operator(x.double(), layer).dtype == torch.float64


def test_a_deployed_and_compiled_network_under_autocast(maybe_kernel):
    """A stem, a DGC layer and a group convolution read each other's results."""
    torch.manual_seed(0)
    layer, group = DynamicGroupConv2d(8, 8, 3, padding=1, heads=2, squeeze_rate=4), nn.Conv2d(8, 12, 3, groups=4)
    layer.inactive_channels.fill_(3)
    pool = nn.MaxPool2d(3, 2, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), pool, layer, nn.BatchNorm2d(8), group
    ).eval()
    deployed, x = deploy(model), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            eager, compiled = deployed(x), torch.compile(deployed, backend="aot_eager", fullgraph=True)(x)
    assert eager.dtype == compiled.dtype == torch.bfloat16
    for y in (eager, compiled):
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=3e-2 * float(expected.abs().max()))


def test_the_gates_of_a_layer_are_not_rounded(maybe_kernel):
    layer, x = layer_for("gated_layer"), torch.randn(2, 4, 9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gated_layer(x, layer).abs().amax((2, 3)).min() > 0
        without = PackedLayer(*layer.flat[:1], None, *layer.flat[2:6], False, *layer.flat[7:9], layer.gates)
        assert (gated_layer(x, without) != 0).any(), "equal gates would all be dropped"


@pytest.mark.parametrize("name", OPERATORS)
def test_is_a_well_behaved_operator(maybe_kernel, name):
    operator = getattr(torch.ops.dgc_fastai, name).default
    torch.library.opcheck(operator, (torch.randn(2, 4, 9, 7), *layer_for(name).flat))


@pytest.mark.parametrize(
    "name, more", [("gated_layer", "residual"), ("gated_layer", "broadcast residual"), ("group_conv2d", "out")]
)
@pytest.mark.parametrize("how", ["no grad", "grad", "compiled", "autocast"])
def test_residuals_and_given_outputs_on_every_way(maybe_kernel, name, how, more):
    operator, layer, x = OPERATORS[name], layer_for(name), torch.randn(2, 4, 9, 7)
    y = operator(x, layer)
    argument = {
        "residual": torch.randn_like(y),
        "broadcast residual": torch.randn(2, 8, 9, 1),
        "out": torch.randn(2, 11, 9, 7)[:, 1:9],
    }[more]
    expected = y if more == "out" else F.relu(y + argument)
    call = torch.compile(operator, backend="aot_eager", fullgraph=True) if how == "compiled" else operator
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = call(x.requires_grad_(how == "grad"), layer, argument)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 if how == "autocast" else 1e-4)
    if more == "out":
        assert found.data_ptr() == argument.data_ptr()


@needs_compiler
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_layer_own_their_weights(name, copied):
    operator, layer, x = OPERATORS[name], layer_for(name), torch.randn(2, 4, 9, 7)
    expected, other = operator(x, layer), copied(layer)
    for tensor in (*layer.flat, layer.packed.weight):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.fill_(float("nan"))
    assert torch.equal(operator(x, other), expected)
