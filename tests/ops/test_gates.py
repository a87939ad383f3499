"""The gates of a layer and the selection of channels."""

import pytest
import torch

from dgc_fastai.ops.gates import drop_smallest, head_gates


def gates_near_one(batch=3, heads=2, channels=64, hidden=4):
    """Arguments of `head_gates` whose results differ by less than bfloat16 can tell apart."""
    squeeze, excite = torch.rand(heads, hidden, channels), torch.rand(heads, channels, hidden)
    bias = torch.linspace(1, 1.0005, channels).repeat(heads, 1)
    return torch.rand(batch, channels), squeeze, 1e-6 * excite, bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_are_float32_under_autocast(dtype):
    arguments = gates_near_one()
    expected = head_gates(*arguments)
    with torch.autocast("cpu", dtype=dtype):
        gates = head_gates(*arguments)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(gates, expected)
    assert (drop_smallest(gates, torch.tensor(48)) != 0).sum(-1).eq(16).all()


def test_gates_are_float32_under_autocast_in_a_compiled_function():
    def selected(*arguments):
        return drop_smallest(head_gates(*arguments), torch.tensor(48))

    arguments = gates_near_one()
    expected = selected(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.compile(selected, backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(found, expected)


def test_gates_without_numbers_and_in_torchscript():
    meta = [argument.to("meta") for argument in gates_near_one()]
    assert head_gates(*meta).shape == (3, 2, 64)
    arguments = gates_near_one()
    assert torch.equal(torch.jit.script(head_gates)(*arguments), head_gates(*arguments))
