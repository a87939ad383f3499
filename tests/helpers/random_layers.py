"""Random layers by the C++ kernel and by their definitions, for any build of the kernel."""

import random

import torch
import torch.nn.functional as F

from dgc_fastai.ops import BACKENDS, kernel
from dgc_fastai.ops.conv_desc import conv_desc
from dgc_fastai.ops.dense import TrainedGroupConv, trains_group_conv
from dgc_fastai.ops.layer import gated_layer_definition
from dgc_fastai.ops.packed_layer import GateWeights, PackedLayer

ONE = (1, 1)
KINDS = ["some kept", "some kept", "all kept", "one kept", "none kept", "all equal", "NaN and Inf"]


def definition(x, gates, weight, stride, padding, dilation):
    """The definition once more, one convolution per head, in which a dropped channel is not there at all."""
    parts = []
    for head in range(gates.shape[1]):
        gate = gates[:, head, :, None, None]
        inputs = torch.where(gate == 0, 0, x * gate)
        parts.append(F.conv2d(inputs, weight[head :: gates.shape[1]], None, stride, padding, dilation))
    return torch.stack(parts, 2).flatten(1, 2)


def random_desc(draw):
    """The geometry of a layer that nobody would build."""

    def pair(choices):
        return draw.choice(choices), draw.choice(choices)

    while True:
        taps, stride = pair([1, 1, 2, 3, 3, 3, 5]), pair([1, 1, 1, 2, 2, 3])
        padding, dilation = pair([0, 0, 1, 1, 2, 4]), pair([1, 1, 1, 2, 3])
        height, width = draw.randint(1, 20), draw.randint(1, 36)
        batch, heads, channels = draw.randint(0, 3), draw.randint(1, 8), draw.choice([1, 2, 3, 5, 8, 16, 29, 64])
        filters = draw.choice([1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 37])
        x, weight = (batch, channels, height, width), (heads * filters, channels, *taps)
        desc = conv_desc(x, weight, heads, stride, padding, dilation)
        if min(desc.out_size) > 0:
            return desc, x, weight


def random_tensors(draw, desc, x_shape, weight_shape, kind):
    dtype = draw.choice([torch.float32, torch.float64])
    x, weight = torch.randn(x_shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    gates = torch.rand(desc.batch, desc.heads, desc.channels, dtype=dtype) + 0.1
    if kind in ("some kept", "NaN and Inf"):
        gates *= torch.rand_like(gates) < draw.random()
    elif kind == "one kept":
        gates *= F.one_hot(torch.randint(desc.channels, gates.shape[:2]), desc.channels)
    elif kind == "none kept":
        gates.zero_()
    elif kind == "all equal":
        gates.fill_(0.7)
    if kind == "NaN and Inf":
        for value in (float("nan"), float("inf"), -float("inf")):
            x[torch.rand_like(x) < 0.01] = value
    return x, gates, weight


def training_agrees(count):
    """Results and gradients of the backend "cpu"."""
    draw = random.Random(0)
    torch.manual_seed(0)
    for number in range(count):
        desc, *shapes = random_desc(draw)
        kind = draw.choice(KINDS)
        x, gates, weight = random_tensors(draw, desc, *shapes, kind)
        geometry, name = (desc.stride, desc.padding, desc.dilation), f"layer {number}, {kind}"
        y = BACKENDS["cpu"].forward(desc, x, gates, weight)
        assert_near(y, definition(x, gates, weight, *geometry), name)
        grad = torch.randn_like(y)
        gradients = BACKENDS["cpu"].backward(desc, grad, x, gates, weight)[:3]
        if kind != "NaN and Inf":  # gradients spread over whole tensors then
            leaves = [part.requires_grad_() for part in (x, gates, weight)]
            expected = torch.autograd.grad(definition(*leaves, *geometry), leaves, grad)
            for ours, theirs in zip(gradients, expected, strict=True):
                assert_near(ours, theirs, name)


def group_convolutions_agree(count):
    """Results and gradients of `TrainedGroupConv`."""
    draw = random.Random(2)
    torch.manual_seed(2)
    for number in range(count):
        dtype = draw.choice([torch.float32, torch.float64])
        groups, taps = draw.randint(2, 6), (draw.choice([1, 2, 3, 5]), draw.choice([1, 3, 4]))
        stride, dilation = (draw.randint(1, 3), draw.randint(1, 2)), (draw.randint(1, 2), draw.randint(1, 3))
        padding, size = (draw.randint(0, 3), draw.randint(0, 2)), (draw.randint(9, 20), draw.randint(10, 30))
        x = torch.randn(draw.randint(0, 3), groups * draw.choice([1, 2, 5, 8, 32]), *size, dtype=dtype)
        filters = groups * draw.choice([1, 2, 3, 4, 9, 16, 33])
        weight = torch.randn(filters, x.shape[1] // groups, *taps, dtype=dtype)
        leaves = x.requires_grad_(), weight.requires_grad_()
        assert trains_group_conv(*leaves, groups)
        expected = F.conv2d(*leaves, None, stride, padding, dilation, groups)
        y = TrainedGroupConv.apply(*leaves, groups, stride, padding, dilation)
        grad = torch.randn_like(y)
        ours, theirs = ((part, *torch.autograd.grad(part, leaves, grad)) for part in (y, expected))
        for pair in zip(ours, theirs, strict=True):
            assert_near(*pair, f"group convolution {number}")


def random_packed_layer(draw, dtype):
    """A layer to which Winograd's algorithm applies."""
    small = kernel.acc_dtype(dtype)
    heads, channels, taps = draw.randint(1, 4), draw.choice([1, 2, 5, 8, 29, 64, 130]), draw.randint(1, 4)
    padding, dilation = (draw.randint(0, 4), draw.randint(0, 3)), (1, draw.randint(1, 3))
    weight = torch.randn(heads * draw.choice([1, 3, 4, 5, 13, 16, 17, 32, 37]), channels, 3, taps, dtype=dtype)
    norm = torch.rand(channels, dtype=small), torch.randn(channels, dtype=small)
    bias = torch.randn(len(weight), dtype=small) if draw.random() < 0.5 else None
    squeeze, excite = torch.randn(heads, 3, channels, dtype=small), torch.randn(heads, channels, 3, dtype=small)
    inactive = torch.tensor(draw.randint(0, channels))
    gates = GateWeights(squeeze, excite, torch.rand(heads, channels, dtype=small), inactive)
    scale, shift = norm if draw.random() < 0.5 else (None, None)
    relu = draw.random() < 0.5
    return PackedLayer(weight, bias, heads, ONE, padding, dilation, relu, scale, shift, gates)


def without_winograd(layer):
    *rest, weight, _, excite = layer.flat
    return PackedLayer.from_flat(*rest, weight, weight.new_empty(0), excite)


def inference_agrees(count):
    """Whole layers by Winograd's algorithm and without, with a residual and without."""
    draw = random.Random(1)
    torch.manual_seed(1)
    for number in range(count):
        dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        layer = random_packed_layer(draw, dtype)
        channels, taps = layer.weight.shape[1], layer.weight.shape[3]
        size = draw.randint(3, 20), draw.randint((taps - 1) * layer.dilation[1] + 1, 36)
        x = torch.randn(draw.randint(0, 3), channels + 2, *size, dtype=dtype)[:, 1:-1]
        desc, direct = layer.desc(x.shape), without_winograd(layer)
        assert layer.packed.winograd_weight.numel() == 2 * layer.packed.weight.numel() == 2 * layer.weight.numel()
        expected = gated_layer_definition(x, layer).double()
        if dtype == torch.float64:  # the gates of the definition are float32
            expected = direct.run("gated_layer", desc, x, x.new_empty(desc.output_shape))
        residual = torch.randn_like(expected).to(dtype) if draw.random() < 0.5 else None
        if residual is not None:
            expected = (expected + residual).relu()
        name = f"layer {number}, {dtype}, {tuple(x.shape)}, {tuple(layer.weight.shape)}"
        limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
        for form in (layer, direct):
            y = form.run("gated_layer", desc, x, x.new_empty(desc.output_shape), residual)
            assert_near(y.double(), expected, name, limit, rtol=0)


def blocks_agree(count):
    """Whole layers in which blocks of channels share a gate: those that keep no block, some and all, with a norm of
    their own and without, larger and smaller than a tile."""
    draw = random.Random(4)
    torch.manual_seed(4)
    for number in range(count):
        dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        layer = random_block_layer(draw, dtype)
        channels, size = layer.weight.shape[1], draw.choice([(7, 7), (1, 1), (3, 14), (40, 41)])
        x = torch.randn(draw.randint(0, 3), channels, *size, dtype=dtype)
        desc = layer.desc(x.shape)
        if min(desc.out_size) < 1:
            continue
        expected = gated_layer_definition(x, layer).double()
        y = layer.run("gated_layer", desc, x, x.new_empty(desc.output_shape))
        name = f"layer {number}, {dtype}, {tuple(x.shape)}, {tuple(layer.weight.shape)}, blocks of {layer.granularity}"
        assert_near(y.double(), expected, name, 2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def random_block_layer(draw, dtype):
    small, heads, size = kernel.acc_dtype(dtype), draw.randint(1, 4), draw.choice([1, 2, 3, 8, 16, 32])
    blocks = draw.randint(1, 6)
    channels, taps = size * blocks, draw.choice([(1, 1), (1, 1), (3, 3), (2, 1)])
    stride, padding = draw.choice([ONE, ONE, (2, 2), (1, 2)]), draw.choice([(0, 0), (0, 0), (1, 0), ONE])
    weight = torch.randn(heads * draw.choice([1, 4, 16, 17]), channels, *taps, dtype=dtype)
    norm = torch.rand(channels, dtype=small), torch.randn(channels, dtype=small)
    squeeze, excite = torch.randn(heads, 3, channels, dtype=small), torch.randn(heads, blocks, 3, dtype=small)
    inactive = torch.tensor(size * draw.randint(0, blocks))
    gates = GateWeights(squeeze, excite, torch.rand(heads, blocks, dtype=small), inactive)
    return PackedLayer(
        weight, None, heads, stride, padding, ONE, False, *(norm if draw.random() < 0.5 else (None, None)), gates
    )


def stems_agree(count):
    """A convolution, ReLU and pooling in one."""
    draw = random.Random(3)
    torch.manual_seed(3)
    for number in range(count):
        dtype, channels, taps = draw.choice([torch.float32, torch.float64]), draw.randint(1, 4), draw.randint(1, 7)
        weight = torch.randn(draw.choice([1, 7, 16, 21, 33]), channels, taps, taps, dtype=dtype)
        bias = torch.randn(len(weight), dtype=dtype) if draw.random() < 0.5 else None
        padding, stride = (draw.randint(0, 3), draw.randint(0, 3)), (draw.randint(1, 2), draw.randint(1, 2))
        layer = PackedLayer(weight, bias, 1, stride, padding, ONE)
        x = torch.randn(draw.randint(0, 2), channels, draw.randint(7, 40), draw.randint(7, 40), dtype=dtype)
        expected = F.max_pool2d(F.conv2d(x, weight, bias, stride, padding).relu(), 3, 2, 1)
        y = layer.run("stem", layer.desc(x.shape), x, torch.empty_like(expected))
        assert_near(y, expected, f"stem {number}")


def assert_near(ours, theirs, name, limit=None, rtol=None):
    limit = limit or (1e-5 if ours.dtype == torch.float32 else 1e-12)
    scale = max(1.0, float(theirs.detach().nan_to_num(0, 0, 0).abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=limit if rtol is None else rtol,
        atol=limit * scale,
        equal_nan=True,
        msg=lambda message: f"{name}, {tuple(theirs.shape)}: {message}",
    )
