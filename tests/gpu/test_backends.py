"""Every backend against the definition, and whole networks by Triton against plain PyTorch."""

import random

import pytest
import torch

from dgc_fastai import DynamicGroupConv2d, deploy, gate_penalty, set_progress
from dgc_fastai.ops import BACKENDS, gated_conv2d, reference, use_backend
from helpers.families import KINDS, small
from helpers.gpu import DEVICE, DRY_RUN, on_device, relative_error
from helpers.networks import images, network
from helpers.random_layers import random_desc, random_tensors

NAMES = [name for name in BACKENDS if name not in ("cpu", "reference")]
# Of the largest value. TF32 and bfloat16 round the gated filters or inputs once.
LIMITS = {"float32": 2e-5, "tf32": 4e-3, "bfloat16": 4e-2, "float16": 5e-3}
LAYERS = 1 if DRY_RUN else 25


def outputs_and_gradients(function, tensors, geometry, grad):
    leaves = [one if one is None else one.detach().requires_grad_() for one in tensors]
    y = function(*leaves, *geometry)
    return y, *torch.autograd.grad(y, [one for one in leaves if one is not None], grad.to(y.dtype))


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_equals_the_definition(name, kind, request, report):
    if name.startswith("triton"):
        request.getfixturevalue("triton")
    if DRY_RUN and kind != "float32":
        pytest.skip("the ordinary tests do this")
    if kind == "tf32":
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # the fixture puts it back
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    draw, worst = random.Random(0), 0.0
    for _ in range(LAYERS):
        desc, *shapes = random_desc(draw)
        x, gates, weight = random_tensors(draw, desc, *shapes, draw.choice(["some kept", "all kept", "one kept"]))
        norm = (torch.rand(desc.channels) + 0.5, torch.randn(desc.channels)) if draw.random() < 0.5 else (None, None)
        last = draw.random() < 0.5
        x, weight = x.to(dtype), weight.to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        tensors, geometry = [x, gates.float(), weight, *norm], (desc.stride, desc.padding, desc.dilation)
        grad = torch.randn(desc.output_shape)
        exact = [one if one is None else one.double() for one in tensors]
        expected = outputs_and_gradients(reference.gated_conv2d, exact, geometry, grad)
        with use_backend(name):
            found = outputs_and_gradients(gated_conv2d, on_device(*tensors), geometry, grad.to(DEVICE))
        for ours, theirs in zip(found, expected, strict=True):
            worst = max(worst, relative_error(ours.cpu(), theirs))
    report(f"{name}, {kind}: largest error", worst)
    assert worst < LIMITS[kind]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_whole_networks_by_triton_and_plain(triton, name, precision, report):
    if DRY_RUN and (name, precision) != ("dgc_densenet22", "float32"):
        pytest.skip("the ordinary tests do this")
    size = 8 if DRY_RUN else 32
    model, x = small(name), torch.randn(2, 3, size, size, device=DEVICE)
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    set_progress(model, 0.5)
    found = {}
    for backend in ("scaled_inputs", "triton"):
        model.zero_grad()
        amp = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16")
        with use_backend(backend):
            with amp:
                y = model(x.contiguous(memory_format=torch.channels_last))
            (y.float().square().mean() + gate_penalty(model)).backward()
        found[backend] = [y, *(one.grad.clone() for one in model.parameters())]
    worst = relative_error(found["triton"][0], found["scaled_inputs"][0])
    gradients = [torch.cat([one.flatten() for one in some[1:]]) for some in found.values()]
    report(f"{name}, {precision}: triton against plain, outputs", worst)
    report(f"{name}, {precision}: triton against plain, gradients", relative_error(*reversed(gradients)))
    assert worst < (1e-3 if precision == "float32" else 0.2)
    assert torch.cosine_similarity(*gradients, dim=0) > (0.999 if precision == "float32" else 0.9)


@pytest.mark.parametrize("name", ["dgc_densenet22", "dgc_resnet18"])
def test_deployed_networks_on_the_device(name):
    x = images(size=32)
    # With open gates in bfloat16, where another selection of channels would make a difference of its own.
    for progress, dtype, limit in ((1.0, None, 1e-3), (0.0, torch.bfloat16, 0.1)):
        model = network(name, progress)
        with torch.no_grad():
            expected = model(x)
            with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
                y = deploy(model.to(DEVICE))(x.to(DEVICE))
        assert relative_error(y.cpu(), expected) < limit, dtype


def test_gates_near_one_are_not_rounded_under_autocast():
    """They would become equal, and all be dropped."""
    layer = DynamicGroupConv2d(32, 32, 3, padding=1, zero_init_gates=True).to(DEVICE).eval()
    layer.inactive_channels.fill_(16)
    x = torch.randn(2, 32, 9, 9, device=DEVICE)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert relative_error(layer(x), expected) < 0.05
