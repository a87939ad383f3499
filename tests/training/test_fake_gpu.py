"""The fake GPU of the tests: what it counts, what it refuses, and that its backward pass is autograd's."""

import pytest
import torch
import torch.nn as nn

from dgc_fastai import gate_penalty, set_progress
from dgc_fastai.ops import gated_conv2d, use_backend
from helpers import fake_autograd
from helpers.fake_gpu import fake_gpu
from helpers.families import KINDS, small


@pytest.fixture
def gpu():
    with fake_gpu() as one:
        yield one


def ones(*shape, **kwargs):
    return torch.ones(*shape, device="cuda", **kwargs)


def test_tensors_of_the_cpu_are_ordinary(gpu):
    with gpu.counting() as counts:
        assert (torch.arange(3) + 1).tolist() == [1, 2, 3]
    assert counts.launches == counts.syncs == counts.bytes == 0


def test_bytes_and_launches_of_operators(gpu):
    x, y = ones(10, 20), ones(20)
    with gpu.counting() as counts:
        z = (x + y.expand(10, 20)).view(20, 10).t()
    assert counts.launches == 1 and counts.bytes == 4 * (200 + 20 + 200)
    with gpu.counting() as counts:
        z.add_(1)
        z.zero_()
        torch.mul(x, 2, out=torch.empty_like(x))
    assert counts.operators == {"add_": 1, "zero_": 1, "mul": 1}
    assert counts.operator_bytes == {"add_": 1600, "zero_": 800, "mul": 1600}
    with gpu.counting() as counts:
        torch._foreach_add_([x, y], 1)
    assert counts.launches == 1 and counts.bytes == 2 * 4 * 220


SYNCS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()),
    "index": lambda x: [1, 2, 3][x.sum().long()],
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "copy to the cpu": lambda x: torch.empty(3).copy_(x),
    "tolist": lambda x: x[:1].tolist(),
    "nonzero": lambda x: x.view(1, 3).nonzero().view(3, 2),
    "mask": lambda x: x.expand(2, 3)[:, x > 0].view(2, 3),
    "tensor": lambda x: torch.tensor(3.0, device="cuda"),
    "from the cpu": lambda x: torch.ones(3).to("cuda"),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
ASYNC = {
    "from the cpu": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "copy from the cpu": lambda x: x.copy_(torch.ones(3), non_blocking=True),
    "where": lambda x: torch.where(x > 0, x, 0),
    "full": lambda x: torch.full((), 3.0, device="cuda"),
    "shape": lambda x: x.shape[0] + x.numel(),
}


@pytest.mark.parametrize("name", SYNCS)
def test_what_waits_for_the_device(gpu, name):
    x = ones(3)
    with gpu.counting() as counts:
        SYNCS[name](x)
    assert counts.syncs == 1


@pytest.mark.parametrize("name", ASYNC)
def test_what_does_not_wait_for_the_device(gpu, name):
    x = ones(3)
    with gpu.counting() as counts:
        ASYNC[name](x)
    assert counts.syncs == 0


def test_mixed_devices_are_refused(gpu):
    with pytest.raises(Exception, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        ones(3) + torch.ones(3)
    assert (ones(3) + torch.tensor(1.0)).is_cuda, "a number of no dimensions may be anywhere"


def test_bodies_of_custom_operators_run(gpu):
    x, gates, weight = ones(2, 8, 5, 5), ones(2, 2, 8), ones(4, 8, 3, 3)
    with gpu.counting() as counts, use_backend("scaled_inputs"):
        y = gated_conv2d(x, gates, weight, None, None, (1, 1), (1, 1), (1, 1))
    assert y.shape == (2, 4, 5, 5) and y.is_cuda
    assert counts.operators["convolution"] == 2, "one for each head"


def test_triton_launches_are_counted_and_do_nothing(gpu):
    pytest.importorskip("triton")
    x, gates, weight = ones(2, 8, 5, 5), ones(2, 2, 8), ones(4, 8, 3, 3)
    with gpu.counting() as counts, use_backend("triton"):
        gated_conv2d(x, gates, weight, None, None, (1, 1), (1, 1), (1, 1))
    assert counts.triton > 0 and counts.bytes > x.numel() * 4 and counts.syncs == 0


def test_conversions_keep_modules_trainable(gpu):
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to("cuda").to(memory_format=torch.channels_last)
    x = ones(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert all(one.grad.is_cuda and one.grad.dtype == torch.float32 for one in layer.parameters())
    assert layer[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", KINDS)
def test_its_backward_pass_is_that_of_autograd(name):
    """On a CPU, with numbers."""
    model, x = small(name).train(), torch.randn(2, 3, 32, 32)
    set_progress(model, 0.5)
    found = []
    for backward in (torch.autograd.backward, fake_autograd.backward):
        torch.manual_seed(0)
        model.zero_grad()
        for _ in range(2):  # gradients are added up
            backward(model(x).square().sum() + gate_penalty(model))
        found.append([one.grad.clone() for one in model.parameters()])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        layout = [[stride for size, stride in zip(one.shape, one.stride()) if size > 1] for one in (ours, theirs)]
        assert layout[0] == layout[1]
