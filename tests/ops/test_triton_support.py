"""Whether Triton runs, where it does and where it does not."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dgc_fastai.ops import BACKENDS
from dgc_fastai.ops.backends import triton_support

pytest.importorskip("triton")

from dgc_fastai.ops.backends import triton_skipping

ON_GPU = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))  # where the interpreter stands for it


@pytest.fixture(autouse=True)
def forget():
    triton_support._runs_on.cache_clear()
    yield
    triton_support._runs_on.cache_clear()


def test_a_gpu_is_tried_once(monkeypatch):
    tried, original = [], triton_skipping.list_kept
    monkeypatch.setattr(triton_skipping, "list_kept", lambda gates: (tried.append(1), original(gates))[1])
    assert triton_support.triton_runs(ON_GPU) and triton_support.triton_runs(ON_GPU) and len(tried) == 1


def test_without_a_c_compiler_a_line_says_so_once(monkeypatch, caplog):
    def no_compiler(gates):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(triton_skipping, "list_kept", no_compiler)
    assert not triton_support.triton_runs(ON_GPU) and not triton_support.triton_runs(ON_GPU)
    assert [record.getMessage() for record in caplog.records] == [
        "Triton does not work on cpu, so DGC layers take longer: Failed to find C compiler."
    ]


def test_what_is_not_on_a_gpu_is_not_tried(monkeypatch):
    monkeypatch.setattr(triton_skipping, "list_kept", lambda gates: pytest.fail("tried"))
    assert triton_support.triton_runs(torch.zeros(1))
    with FakeTensorMode():
        assert triton_support.triton_runs(torch.zeros(1, device="cuda"))


def test_without_the_interpreter_a_cpu_is_left_to_pytorch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 4, 3, 3)
    assert not triton_support.triton_runs(x)
    for name in ("cudnn", "triton", "triton_skipping"):
        assert not BACKENDS[name].is_supported(None, x, torch.zeros(2, 4, 1, 1)), name
