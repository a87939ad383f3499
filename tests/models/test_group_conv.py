"""Group convolutions, trained by the C++ kernel where it can."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dgc_fastai.layers.group_conv import GroupConv2d
from dgc_fastai.ops.selection import use_backend
from helpers.operators import needs_compiler


@pytest.fixture
def group_conv():
    conv = GroupConv2d(16, 8, 3, padding=1, groups=4, bias=False)
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    return conv, x, F.conv2d(x, conv.weight, None, 1, 1, 1, 4)


def by_the_kernel(y):
    return "TrainedGroupConv" in type(y.grad_fn).__name__


@needs_compiler
def test_group_convolutions_are_trained_by_the_kernel(group_conv):
    conv, x, expected = group_conv
    y = conv(x)
    assert by_the_kernel(y) and by_the_kernel(conv(x.detach()))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    leaves = x, conv.weight
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_group_convolutions_are_pytorch_s_where_the_kernel_does_not_do(group_conv):
    conv, x, expected = group_conv
    last = x.detach().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(conv(x), expected)
    assert not by_the_kernel(conv(last))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    biased = GroupConv2d(16, 8, 3, groups=4)
    wide = GroupConv2d(66, 4, 1, groups=2, bias=False)
    assert not by_the_kernel(biased(x)) and not by_the_kernel(wide(torch.randn(1, 66, 3, 3)))
    with use_backend("reference"):  # which has second derivatives
        y = conv(x)
        assert torch.equal(y, expected)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0
    loss = lambda x: torch.func.functional_call(conv, dict(conv.named_parameters()), (x,)).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])
    for form in (torch.jit.script(conv), torch.jit.trace(conv, x), torch.compile(conv, backend="aot_eager")):
        torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-5)
    with FlopCounterMode(display=False) as counter:
        conv(x)
    assert counter.get_total_flops() == 2 * expected.numel() * 4 * 9
