"""The C++ kernel: every remainder of its blocks, and what happens where it cannot be built."""

import logging
import subprocess

import pytest
import torch
from test_ops import run

from dgc_fastai.ops import cpu, gated_conv2d, use_formulation

ONE, NONE = (1, 1), (0, 0)
needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="there is no C++ compiler here")


def case(batch, heads, channels, filters, height, width, share, dtype=torch.float32):
    x, gates = torch.randn(batch, channels, height, width, dtype=dtype), torch.rand(batch, heads, channels, dtype=dtype)
    gates = (gates + 0.1) * (torch.rand(batch, heads, channels) < share)
    tensors = x, gates, torch.randn(heads * filters, channels, 1, 1, dtype=dtype)
    return [part.requires_grad_() for part in tensors] + [None, None]


def agree(tensors, stride=ONE):
    geometry = stride, NONE, ONE
    assert cpu.takes(tensors[0], tensors[2], NONE)
    for ours, theirs in zip(run("cpu", tensors, geometry), run("reference", tensors, geometry), strict=True):
        limit = 1e-5 * max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=limit)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_remainder_of_pixels_filters_and_channels(dtype):
    for width in (1, 3, 4, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 33, 40, 47, 49, 65):
        agree(case(1, 2, 7, 5, 1, width, 0.7, dtype))
    for filters in (1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 64, 65):  # from 32 on another way to the weight's gradient
        agree(case(1, 2, 5, filters, 3, 5, 0.7, dtype))
    for channels in (1, 2, 3, 4, 5, 6, 7, 8, 13):
        agree(case(2, 2, channels, 4, 3, 5, 0.9, dtype))


@needs_compiler
def test_more_pixels_than_are_copied_at_a_time():
    agree(case(2, 1, 600, 4, 10, 23, 1.0))  # 600 rows of 48 pixels fill the copy
    agree(case(2, 1, 600, 40, 10, 23, 0.5))


@needs_compiler
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_none_one_or_all_channels_kept(share):
    agree(case(3, 2, 20, 4, 5, 5, share))


@needs_compiler
@pytest.mark.parametrize("stride", [(2, 2), (3, 1)])
def test_strides(stride):
    agree(case(2, 2, 9, 4, 8, 7, 0.5), stride)


@needs_compiler
def test_every_number_of_threads_gives_the_same():
    tensors, before = case(5, 2, 24, 8, 6, 6, 0.5), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            agree(tensors)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_dropped_channels_are_not_looked_at():
    x, gates, weight, _, _ = case(2, 2, 12, 4, 5, 5, 1.0)
    with torch.no_grad():
        gates[:, :, 3:6] = 0
        x[:, 3:6], weight[:, 3:6] = float("nan"), float("inf")
    y, dx, dgates, dweight = run("cpu", [x, gates, weight, None, None], (ONE, NONE, ONE))
    assert all(part.isfinite().all() for part in (y, dx, dgates, dweight))


def test_takes_only_what_it_is_made_for():
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(4, 8, 1, 1)
    assert not cpu.takes(x, torch.randn(4, 8, 3, 3), ONE)
    assert not cpu.takes(x, weight, ONE)
    assert not cpu.takes(x.bfloat16(), weight.bfloat16(), NONE)
    assert not cpu.takes(x, weight.double(), NONE)  # whose bits would be read as others
    assert not cpu.takes(x.contiguous(memory_format=torch.channels_last), weight, NONE)
    assert not cpu.takes(x.to("meta"), weight.to("meta"), NONE)


@pytest.fixture
def not_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    yield tmp_path / "dgc_fastai"
    cpu.library.cache_clear()


@needs_compiler
def test_built_once_and_nothing_else_is_left(not_built, monkeypatch):
    assert cpu.library() is not None
    (built,) = not_built.iterdir()
    assert built.suffix == ".so"
    cpu.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert cpu.library() is not None


@pytest.mark.parametrize(
    "compiler, reason", [("no-such-compiler", "there is no C++ compiler"), ("false", "non-zero exit status")]
)
def test_without_a_compiler_everything_works_and_the_log_says_so_once(not_built, monkeypatch, caplog, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    tensors = case(2, 2, 12, 4, 5, 5, 0.5)
    with caplog.at_level(logging.INFO, "dgc_fastai"), use_formulation("cpu"):
        for _ in range(2):
            y = gated_conv2d(*tensors, ONE, NONE, ONE)
    torch.testing.assert_close(y, run("reference", tensors, (ONE, NONE, ONE))[0])
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert reason in record.message and "compiler" in record.message
    assert not not_built.exists() or not list(not_built.iterdir())
