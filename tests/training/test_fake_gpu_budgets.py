"""What a training step may cost, against the dense baseline's: a table of launches, bytes and synchronizations."""

from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import dgc_fastai  # noqa: F401  (registers the networks)
from dgc_fastai import DynamicGroupConv2d, gate_penalty
from dgc_fastai.ops import use_backend
from helpers.fake_gpu import fake_gpu

# Channels, filters, kernel, side: the first and the last stage of ResNet-18 at 224 px, and both convolutions of a dense
# layer of DenseNet-86 at 32 px.
LAYERS = {
    "resnet18, first": (64, 64, 3, 56),
    "resnet18, last": (512, 512, 3, 7),
    "densenet86, 1x1": (160, 64, 1, 16),
}
# Side, batch and keywords. All layers of a DenseNet are alike: fifteen of 42 do.
NETWORKS = {"dgc_resnet18": (224, 32, {}), "dgc_densenet86": (32, 64, {"stages": (5, 5, 5)})}
# By backend: launches of a network, and bytes of a layer, as multiples of the dense ones. "plain" is cuDNN's
# convolutions, which run until the Triton kernels were measured to be faster.
LAUNCHES = {
    ("dgc_resnet18", "triton"): 1.5,
    ("dgc_densenet86", "triton"): 1.5,
    ("dgc_resnet18", "plain"): 2.6,
    ("dgc_densenet86", "plain"): 1.3,
}
BYTES = {
    ("resnet18, first", "triton"): 1.3,
    ("resnet18, last", "triton"): 1.3,
    ("densenet86, 1x1", "triton"): 1.3,
    ("resnet18, first", "plain"): 2.7,
    ("resnet18, last", "plain"): 2.2,
    ("densenet86, 1x1", "plain"): 1.4,
}


@pytest.fixture
def gpu():
    with fake_gpu() as one:
        yield one


def backend(name):
    if name == "triton":
        pytest.importorskip("triton")
    return nullcontext() if name == "plain" else use_backend(name)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def count_step(gpu, name, way="plain", precision=torch.bfloat16):
    """Counts of a bare step: forward pass, loss, penalty, backward pass and optimizer."""
    side, batch, keywords = NETWORKS[name.removesuffix("_dense")]
    model = timm.create_model(name, **keywords).to("cuda", memory_format=torch.channels_last)
    x, labels = last(torch.randn(batch, 3, side, side, device="cuda")), torch.zeros(batch, dtype=int, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=True)
    with gpu.counting() as counts, backend(way):
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(model(x), labels)
        (loss + 1e-5 * gate_penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return counts


def count_layer(gpu, layer, sizes, precision=torch.bfloat16):
    """Counts of a layer's forward and backward pass."""
    channels, *_, side = sizes
    layer = layer.to("cuda", memory_format=torch.channels_last)
    x = last(torch.randn(32, channels, side, side, device="cuda", dtype=precision)).requires_grad_()
    with gpu.counting() as counts:
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            y = layer(x)
        # The penalty is in the loss of any network with gates; the upstream gradient is none of the layer's launches.
        penalty = [gate_penalty(layer)] if isinstance(layer, DynamicGroupConv2d) else []
        torch.autograd.backward([y, *penalty], [torch.empty_like(y), *(None for _ in penalty)])
    return counts


@pytest.mark.parametrize("name", NETWORKS)
def test_launches_of_a_step(gpu, name):
    dense = count_step(gpu, f"{name}_dense")
    for way in ("plain", "triton"):
        ours = count_step(gpu, name, way)
        assert ours.syncs == ours.copies == 0, ours.places
        assert ours.launches <= LAUNCHES[name, way] * dense.launches, (ours.launches, dense.launches, ours.operators)


@pytest.mark.parametrize("name, way", BYTES)
def test_bytes_of_a_layer(gpu, name, way):
    channels, filters, kernel, _ = LAYERS[name]
    geometry = channels, filters, kernel, 1, kernel // 2
    dense = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(*geometry, bias=False))
    with backend(way):
        ours = count_layer(gpu, DynamicGroupConv2d(*geometry), LAYERS[name])
    theirs = count_layer(gpu, dense, LAYERS[name])
    assert ours.syncs == 0
    assert ours.bytes <= BYTES[name, way] * theirs.bytes, (ours.bytes, theirs.bytes, ours.operator_bytes)
