"""Every formulation of the operation against its definition."""

import random

import pytest
import torch
from golden import close

from dgc_fastai import ops
from dgc_fastai.ops import pointwise, reference

ONE = (1, 1)


def random_case(seed, dtype=torch.float32):
    """Input, gates (some zero), weight and stride of a random 1x1 layer."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, channels = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 40)
    stride = rng.choice([(1, 1), (2, 2), (2, 1), (3, 2)])
    x = torch.randn(batch, channels, rng.randint(1, 9), rng.randint(1, 9), dtype=dtype)
    gates = torch.rand(batch, heads, channels, dtype=dtype) * (torch.rand(batch, heads, channels) < rng.random())
    weight = torch.randn(heads * rng.randint(1, 8), channels, 1, 1, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, gates, weight)], stride


@pytest.mark.parametrize("seed", range(40))
def test_pointwise_equals_the_reference_forward_and_backward(seed):
    inputs, stride = random_case(seed)
    results = []
    for function, rest in ((pointwise, ()), (reference, ((0, 0), ONE))):
        y = function.gated_conv2d(*inputs, stride, *rest)
        torch.manual_seed(1)
        results.append((y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), inputs)))
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape
        if theirs.numel() and theirs.abs().max() > 0:
            close(ours, theirs, 1e-5)


@pytest.mark.parametrize("function", [ops.gated_conv2d, reference.gated_conv2d])
@pytest.mark.parametrize("kernel, stride", [(1, ONE), (1, (2, 2)), (3, (2, 1))])
def test_gradients_are_the_function_s(function, kernel, stride):
    x, gates = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.rand(2, 2, 3, dtype=torch.float64)
    weight = torch.randn(4, 3, kernel, kernel, dtype=torch.float64)
    padding = (kernel // 2, kernel // 2)
    inputs = [tensor.requires_grad_() for tensor in (x, gates, weight)]
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors, stride, padding, ONE), inputs)


@pytest.mark.parametrize(
    "shape, heads, outputs, arguments, expected",
    [
        ((2, 8, 8, 8), 4, 32, (ONE, (0, 0), ONE), "pointwise"),
        ((2, 8, 8, 8), 4, 256, (ONE, (0, 0), ONE), "reference"),  # as many weights as scaled inputs
        ((2, 8, 8, 8), 4, 64, ((2, 2), (0, 0), ONE), "reference"),
        ((2, 8, 8, 8), 4, 60, ((2, 2), (0, 0), ONE), "pointwise"),
        ((2, 8, 8, 8), 4, 32, (ONE, ONE, ONE), "reference"),  # padding makes a border of zeros
    ],
)
def test_the_choice_follows_the_shapes(monkeypatch, shape, heads, outputs, arguments, expected):
    chosen = []
    for module in (pointwise, reference):
        name, original = module.__name__.rpartition(".")[2], module.gated_conv2d
        monkeypatch.setattr(module, "gated_conv2d", lambda *a, n=name, f=original: (chosen.append(n), f(*a))[1])
    weight = torch.randn(outputs, shape[1], 1, 1)
    ops.gated_conv2d(torch.randn(shape), torch.rand(shape[0], heads, shape[1]), weight, *arguments)
    assert chosen == [expected]


def test_low_precision_stays_near_float32():
    for seed in range(10):
        inputs, stride = random_case(seed)
        expected = pointwise.gated_conv2d(*inputs, stride)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = pointwise.gated_conv2d(*inputs, stride)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * max(1.0, float(expected.abs().max())))
