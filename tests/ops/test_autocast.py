"""Autocast in training, eager and compiled: what is cast, and what stays in float32. test_dispatch has inference."""

import copy

import pytest
import torch

from dgc_fastai import DynamicGroupConv2d, gate_penalty
from dgc_fastai.ops import gated_conv2d

ONE = (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operator_casts_input_and_filters_only(dtype):
    torch._dynamo.reset()
    x, gates, weight = torch.randn(2, 4, 6, 6), torch.rand(2, 2, 4), torch.randn(6, 4, 3, 3)
    norm = torch.rand(4) + 0.5, torch.randn(4)
    leaves = [one.requires_grad_() for one in (x, gates, weight, *norm)]
    expected = gated_conv2d(*leaves, ONE, ONE, ONE)
    grads = torch.autograd.grad(expected.sum(), leaves)
    for call in (gated_conv2d, torch.compile(gated_conv2d, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", dtype):
            y = call(*leaves, ONE, ONE, ONE)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=3e-2 * float(expected.detach().abs().max()))
        for ours, theirs in zip(torch.autograd.grad(y.sum(), leaves), grads):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("preact", [True, False])
def test_a_layer_in_training(preact):
    torch._dynamo.reset()
    layer = DynamicGroupConv2d(8, 8, 3, padding=1, heads=2, squeeze_rate=4, preact=preact)
    other, x = copy.deepcopy(layer), torch.randn(4, 8, 9, 9)
    found = []
    for one, call in ((layer, layer), (other, torch.compile(other, backend="aot_eager", fullgraph=True))):
        gates = []
        one.gates.register_forward_hook(lambda module, inputs, output, gates=gates: gates.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16 and gate_penalty(one).dtype == torch.float32
        assert set(gates) <= {torch.float32}
        (y.float().square().mean() + gate_penalty(one)).backward()
        assert {weight.grad.dtype for weight in one.parameters()} == {torch.float32}
        found.append(torch.cat([weight.grad.flatten() for weight in one.parameters()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.999
