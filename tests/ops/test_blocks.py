"""Gates of blocks of neighboring channels: the definition against plain sums, and every backend against it."""

import pytest
import torch
import torch.nn.functional as F

from dgc_fastai.ops import BACKENDS, gated_conv2d, reference
from dgc_fastai.ops.gates import drop_smallest, spread_blocks
from helpers.operators import run

ONE = (1, 1)
OWN = [name for name, backend in BACKENDS.items() if not backend.uses_triton]  # Triton has tests of its own


def case(granularity, kernel=1, blocks=5, heads=3, dtype=torch.float32):
    torch.manual_seed(0)
    channels = granularity * blocks
    x, weight = torch.randn(3, channels, 7, 6), torch.randn(4 * heads, channels, kernel, kernel)
    gates = (torch.rand(3, heads, blocks) + 0.1) * (torch.rand(3, heads, blocks) < 0.5)
    return [part.to(dtype).requires_grad_() for part in (x, gates, weight)] + [None, None]


def plain_sum(x, gates, weight, stride, padding):
    """One sample, one head, one block at a time."""
    heads, blocks = gates.shape[1:]
    size, samples = x.shape[1] // blocks, []
    for sample, own in zip(x, gates):
        outputs = 0
        for head in range(heads):
            for block in range(blocks):
                if own[head, block] != 0:
                    of_block = slice(block * size, (block + 1) * size)
                    filters = torch.zeros_like(weight)
                    filters[head::heads, of_block] = own[head, block] * weight[head::heads, of_block]
                    outputs = outputs + F.conv2d(sample[None], filters, None, stride, padding)
        samples.append(outputs)
    return torch.cat(samples)


@pytest.mark.parametrize("granularity", [1, 8, 16])
@pytest.mark.parametrize("kernel, stride, padding", [(1, ONE, (0, 0)), (3, (2, 1), ONE)])
def test_the_definition_against_plain_sums(granularity, kernel, stride, padding):
    tensors = case(granularity, kernel, dtype=torch.float64)
    expected = plain_sum(*tensors[:3], stride, padding)
    y = reference.gated_conv2d(*tensors, stride, padding, ONE)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((part * upstream).sum(), tensors[:3]) for part in (y, expected))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)
    assert torch.equal(ours[1] != 0, tensors[1] != 0)


@pytest.mark.parametrize("backend", [*OWN, None])
@pytest.mark.parametrize("granularity", [1, 8, 16])
@pytest.mark.parametrize("kernel, stride", [(1, ONE), (1, (2, 2)), (3, ONE)])
def test_every_backend_computes_the_definition(backend, granularity, kernel, stride):
    tensors, geometry = case(granularity, kernel), (stride, (kernel // 2, kernel // 2), ONE)
    found, expected = run(backend, tensors, geometry), run("reference", tensors, geometry)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.detach().abs().max())))


def test_gates_constant_in_blocks_are_the_gates_of_blocks():
    (x, gates, weight, *_) = case(8)
    geometry = None, None, ONE, (0, 0), ONE
    by_channel = gates.repeat_interleave(8, 2)
    assert torch.equal(gated_conv2d(x, gates, weight, *geometry), gated_conv2d(x, by_channel, weight, *geometry))


@pytest.mark.parametrize("blocks", [3, 41])
def test_gates_that_are_no_blocks_are_refused(blocks):
    x, gates, weight = torch.randn(2, 40, 5, 5), torch.rand(2, 2, blocks), torch.randn(4, 40, 1, 1)
    for function in (gated_conv2d, reference.gated_conv2d):
        with pytest.raises(ValueError, match=f"{blocks} gates do not divide 40 input channels"):
            function(x, gates, weight, None, None, ONE, (0, 0), ONE)


def test_whole_blocks_are_dropped_and_parts_of_them_are_not():
    gates = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    kept = {0: [3, 1, 2, 2], 7: [3, 1, 2, 2], 8: [3, 0, 2, 2], 16: [3, 0, 0, 0], 31: [3, 0, 0, 0], 32: [0, 0, 0, 0]}
    for count, expected in kept.items():
        for function in (drop_smallest, torch.compile(drop_smallest, backend="eager", fullgraph=True)):
            assert function(gates, torch.tensor(count), 8).tolist() == [expected]


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_spreading_repeats_along_one_dimension_and_adds_up_gradients(dim):
    blocks = torch.randn(2, 2, 2, requires_grad=True)
    spread = spread_blocks(blocks, 6, dim)
    assert torch.equal(spread, blocks.repeat_interleave(3, dim))
    assert torch.equal(torch.jit.script(spread_blocks)(blocks, 6, dim), spread)
    spread.sum().backward()
    assert (blocks.grad == 3).all()
    assert spread_blocks(blocks, 2, dim) is blocks
