"""What a layer asks of a GPU in a training step, counted without one, beside batch norm, ReLU and convolution."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn

from dgc_fastai import DynamicGroupConv2d
from dgc_fastai.ops import use_backend
from helpers.fake_gpu import fake_gpu

pytest.importorskip("triton")

AROUND = {"_statistics", "_select", "_select_backward", "_finish_backward"}

# Channels, outputs, image size, kernel, stride: layers of ResNet-18 at 224 px and of the DenseNet for 32 px.
LAYERS = [(64, 64, 56, 3, 1), (64, 128, 56, 3, 2), (256, 256, 14, 3, 1), (512, 512, 7, 3, 1), (64, 128, 56, 1, 2)]
POINTWISE = [(24, 32, 32, 1, 1), (240, 64, 16, 1, 1), (464, 128, 8, 1, 1)]


def counted(layer, sizes, dtype, backend=None, batch=256):
    with fake_gpu() as gpu, use_backend(backend):
        layer = layer.to("cuda", memory_format=torch.channels_last)
        x = torch.empty(batch, sizes[0], sizes[2], sizes[2], dtype=dtype).to("cuda", memory_format=torch.channels_last)
        x.requires_grad_()
        with gpu.counting() as counts:
            with torch.autocast("cuda", dtype=dtype) if dtype != torch.float32 else nullcontext():
                y = layer(x)
            y.backward(torch.empty_like(y))
    assert x.grad.is_contiguous(memory_format=torch.channels_last) and counts.syncs == 0
    return counts


def both(sizes, dtype, backend):
    channels, outputs, _, kernel, stride = sizes
    geometry = channels, outputs, kernel, stride, kernel // 2
    convolution = nn.Conv2d(*geometry, bias=False)
    dense = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), convolution)
    return counted(DynamicGroupConv2d(*geometry), sizes, dtype, backend), counted(dense, sizes, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", LAYERS + POINTWISE, ids=str)
def test_a_layer_by_the_triton_kernels_is_as_lean_as_a_dense_one(sizes, dtype):
    ours, dense = both(sizes, dtype, "triton")
    assert ours.operators.keys() >= {f"triton.{name}" for name in AROUND}
    assert ours.launches <= dense.launches
    assert ours.bytes <= 1.3 * dense.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes, bytes_ratio", [(LAYERS[0], 2.7), (LAYERS[3], 2.8), (POINTWISE[1], 1.35)], ids=str)
def test_a_layer_by_cudnn(sizes, bytes_ratio, dtype):
    """With heads x inputs for cuDNN to read; they are written and read once in each direction."""
    ours, dense = both(sizes, dtype, None)
    assert ours.operators.keys() >= {f"triton.{name}" for name in AROUND}
    assert ours.launches <= 20 + 2 * (dtype != torch.float32)  # casts of the filters and of their gradient
    assert ours.bytes <= bytes_ratio * dense.bytes


def test_filters_of_a_whole_batch_are_scaled_at_once():
    """condensenet74's last layers have a million values: a few samples at a time, they took thousands of launches."""
    for backend in (None, "scaled_weights"):
        ours = counted(DynamicGroupConv2d(1024, 512, 1), (1024, 512, 14), torch.float32, backend)
        assert ours.launches < 60
