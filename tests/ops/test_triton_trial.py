"""The trial of the Triton kernels on a device, in Triton's interpreter or on a GPU."""

import logging

import pytest
import torch

from dgc_fastai import DynamicGroupConv2d
from dgc_fastai.ops import fused_layer, triton_trial, use_backend
from helpers.triton_layers import DEVICE, improve_interpreter

pytest.importorskip("triton")

from dgc_fastai.ops.backends import triton_layer, triton_passes


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    triton_trial._tried.cache_clear()
    if DEVICE == "cpu":
        improve_interpreter(monkeypatch)
    yield
    triton_trial._tried.cache_clear()


def tried(dtype=torch.float32):
    return triton_trial._tried(torch.device(DEVICE), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_that_work_pass(dtype, caplog):
    state = torch.get_rng_state()
    assert tried(dtype) and not caplog.records
    assert torch.equal(torch.get_rng_state(), state)


def wrong_gates(*arguments, select=triton_layer.select):
    found = select(*arguments)
    return found._replace(gates=found.gates + 0.01)


def nan_in_dx(*arguments, backward=triton_layer.backward):
    dx, *rest = backward(*arguments)
    return torch.full_like(dx, torch.nan), *rest


def half_of_the_heads(*arguments, scale=triton_passes.scale):
    return scale(*arguments) * torch.tensor([1, 0.5], device=DEVICE).view(2, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "module, name, broken",
    [
        (triton_layer, "select", wrong_gates),
        (triton_layer, "backward", nan_in_dx),
        (triton_passes, "scale", half_of_the_heads),
    ],
)
def test_wrong_numbers_fail_with_one_warning(module, name, broken, monkeypatch, caplog):
    monkeypatch.setattr(module, name, broken)
    assert not tried() and not tried()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "PyTorch's take their place: their numbers are wrong" in caplog.text


def test_kernels_that_do_not_run_fail_with_one_warning(monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("PTXAS error\nand a page more")

    monkeypatch.setattr(triton_layer, "select", fail)
    assert not tried()
    assert [record.message.endswith("take their place: PTXAS error") for record in caplog.records] == [True]


def test_layers_are_left_to_pytorch_then(monkeypatch):
    layer, x = DynamicGroupConv2d(16, 8, 1), torch.randn(2, 16, 4, 4)
    with use_backend("cudnn"):
        assert fused_layer.is_supported(x, layer.gates.squeeze)
        monkeypatch.setattr("dgc_fastai.ops.selection.triton_works", lambda x: False)
        assert not fused_layer.is_supported(x, layer.gates.squeeze)
