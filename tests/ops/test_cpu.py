"""The C++ kernel: every remainder of its tiles, and what happens where it cannot be built."""

import ctypes
import logging
import subprocess

import pytest
import torch

from dgc_fastai.ops import BACKENDS, build, gated_conv2d, kernel, structures, use_backend
from dgc_fastai.ops.backends import cpu
from dgc_fastai.ops.conv_desc import conv_desc
from dgc_fastai.ops.packed_layer import pack_weight, winograd_pays
from helpers import random_layers
from helpers.operators import needs_compiler, run

ONE, NONE = (1, 1), (0, 0)


def case(batch, heads, channels, filters, height, width, share, dtype=torch.float32, taps=(1, 1)):
    x, gates = torch.randn(batch, channels, height, width, dtype=dtype), torch.rand(batch, heads, channels, dtype=dtype)
    gates = (gates + 0.1) * (torch.rand(batch, heads, channels) < share)
    tensors = x, gates, torch.randn(heads * filters, channels, *taps, dtype=dtype)
    return [part.requires_grad_() for part in tensors] + [None, None]


def agree(tensors, stride=ONE, padding=NONE, dilation=ONE):
    geometry = stride, padding, dilation
    assert cpu.is_supported(tensors[0], tensors[2])
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_remainder_of_larger_filters(dtype):
    for width in (1, 2, 7, 8, 9, 14, 23, 24, 25, 33):
        agree(case(1, 2, 7, 5, 2, width, 0.7, dtype, (3, 3)), padding=ONE)
    for filters in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 33, 65):
        agree(case(2, 2, 5, filters, 4, 5, 0.7, dtype, (3, 3)), padding=ONE)
    for channels in (1, 2, 3, 4, 5, 8, 13):
        agree(case(2, 2, channels, 4, 4, 5, 0.9, dtype, (3, 3)), padding=ONE)
    for taps in ((1, 2), (2, 3), (5, 5), (7, 1), (4, 7)):
        agree(case(2, 2, 5, 9, 9, 8, 0.7, dtype, taps), padding=(1, 3))


@needs_compiler
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1), (1, 2), (4, 5)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 3), (4, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (1, 3)])
def test_strides_borders_and_dilation(stride, padding, dilation):
    agree(case(2, 2, 6, 5, 9, 10, 0.6, torch.float64, (3, 3)), stride, padding, dilation)
    agree(case(2, 1, 6, 5, 3, 7, 0.6, torch.float64, (1, 1)), stride, padding, dilation)


@needs_compiler
def test_images_too_large_for_one_tile():
    agree(case(1, 2, 40, 4, 90, 70, 0.5, taps=(3, 3)), padding=ONE)
    agree(case(3, 1, 90, 3, 47, 51, 1.0, taps=(3, 3)), (2, 2), ONE)


@needs_compiler
def test_more_pixels_than_are_copied_at_a_time():
    agree(case(2, 1, 600, 4, 10, 23, 1.0))  # 600 rows of 48 pixels fill the copy
    agree(case(2, 1, 600, 40, 10, 23, 0.5))


@needs_compiler
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_none_one_or_all_channels_kept(share):
    agree(case(3, 2, 20, 4, 5, 5, share))
    agree(case(3, 2, 20, 4, 5, 5, share, taps=(3, 3)), padding=ONE)


@needs_compiler
@pytest.mark.parametrize("stride", [(2, 2), (3, 1)])
def test_strides(stride):
    agree(case(2, 2, 9, 4, 8, 7, 0.5), stride)


@needs_compiler
def test_every_number_of_threads_gives_the_same():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            agree(case(5, 2, 24, 8, 6, 6, 0.5))
            agree(case(1, 3, 7, 8, 6, 6, 0.5, taps=(3, 3)), padding=ONE)
            agree(case(5, 2, 7, 8, 6, 6, 0.5, taps=(3, 3)), (2, 2), ONE)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("side", [1, 3])
def test_dropped_channels_are_not_looked_at(side):
    x, gates, weight, _, _ = case(2, 2, 12, 4, 5, 5, 1.0, taps=(side, side))
    with torch.no_grad():
        gates[:, :, 3:6] = 0
        x[:, 3:6], weight[:, 3:6] = float("nan"), float("inf")
    y, dx, dgates, dweight = run("cpu", [x, gates, weight, None, None], (ONE, NONE, ONE))
    assert all(part.isfinite().all() for part in (y, dx, dgates, dweight))


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_where_it_is_seen(value):
    """And nowhere else: the borders between rows, which neighbours share, carry nothing over."""
    x, gates, weight, _, _ = case(2, 2, 6, 5, 7, 6, 1.0, taps=(3, 3))
    with torch.no_grad():
        x[0, 1, 2, 5], x[1, 3, 6, 0], x[1, 0, 0, 0] = value, -value, value
        for stride in (ONE, (2, 2)):
            tensors, geometry = [x, gates, weight, None, None], (stride, ONE, ONE)
            y, expected = (gated(name, tensors, geometry) for name in ("cpu", "reference"))
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
            assert 0 < int((~y.isfinite()).sum()) < y.numel() // 2


def gated(name, tensors, geometry):
    with use_backend(name):
        return gated_conv2d(*tensors, *geometry)


@needs_compiler
def test_2000_random_layers_in_training():
    random_layers.training_agrees(2000)


@needs_compiler
def test_200_random_group_convolutions():
    random_layers.group_convolutions_agree(200)


@needs_compiler
def test_200_random_layers_in_inference():
    random_layers.inference_agrees(200)


@needs_compiler
def test_200_random_layers_whose_blocks_share_a_gate():
    random_layers.blocks_agree(200)


@needs_compiler
def test_100_random_stems():
    random_layers.stems_agree(100)


@needs_compiler
@pytest.mark.parametrize("weight, stride, dilation, pays", [
    ((64, 64, 3, 3), ONE, ONE, True), ((8, 8, 3, 1), ONE, (1, 2), True), ((512, 512, 3, 3), ONE, ONE, False),
    ((64, 64, 3, 3), (2, 2), ONE, False), ((64, 64, 3, 3), ONE, (2, 2), False), ((64, 64, 1, 1), ONE, ONE, False),
])  # fmt: skip
def test_where_winograd_pays(weight, stride, dilation, pays):
    assert winograd_pays(weight, stride, dilation) == pays


@needs_compiler
def test_bfloat16_is_float32_rounded():
    x, gates, weight, _, _ = case(3, 2, 12, 20, 7, 6, 0.6, taps=(3, 3))
    x, weight = x.detach().bfloat16(), weight.detach().bfloat16()
    backend, desc = BACKENDS["cpu"], conv_desc(x.shape, weight.shape, 2, ONE, ONE, ONE)
    assert backend.is_supported(desc, x, weight)
    gates = gates.detach()
    y = backend.forward(desc, x, gates, weight)
    exact = backend.forward(desc, x.float(), gates, weight.float())
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0, atol=0)
    found = backend.backward(desc, y, x, gates, weight)[:3]
    expected = backend.backward(desc, y.float(), x.float(), gates, weight.float())[:3]
    for part, other in zip(found, expected):
        torch.testing.assert_close(part, other.to(part.dtype), rtol=0, atol=0)
    assert [part.dtype for part in found] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_supports_only_what_it_is_made_for():
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(4, 8, 1, 1)
    desc = conv_desc(x.shape, weight.shape, 2, ONE, NONE, ONE)

    def supports(x, weight):
        return BACKENDS["cpu"].is_supported(desc, x, weight)

    assert supports(x, weight) == (kernel.library() is not None)
    assert not supports(x.half(), weight.half())
    assert not supports(x, weight.double())  # whose bits would be read as others
    assert not supports(x.contiguous(memory_format=torch.channels_last), weight)
    assert not supports(x.to("meta"), weight.to("meta"))


@needs_compiler
def test_a_function_refuses_structures_in_another_order_and_of_another_kind():
    desc = conv_desc((1, 4, 3, 3), (2, 4, 1, 1), 1, ONE, NONE, ONE)
    function, layer, args = (
        kernel.function("gated_conv2d", torch.float32),
        structures.PackedLayer(),
        structures.ForwardArgs(),
    )
    for wrong in ((layer, desc.struct, args), (desc.struct, layer, structures.BackwardArgs()), (desc.struct, layer, 0)):
        with pytest.raises(ctypes.ArgumentError):
            function(*wrong)


@needs_compiler
@pytest.mark.parametrize("change", ["order", "missing", "size"])
def test_structures_that_differ_from_those_of_the_kernel_are_refused(monkeypatch, change):
    fields = list(structures.PackArgs._fields_)
    fields = {"order": fields[::-1], "missing": fields[:1], "size": [("weight", ctypes.c_int32), fields[1]]}[change]
    wrong = type("PackArgs", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(structures, "PackArgs", wrong)
    kernel.library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="descriptors.h"):
            kernel.library()
    finally:
        kernel.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_weights_hold_every_value_once_in_blocks_of_16_filters(grouped):
    heads, filters, channels = 3, 18, 5
    weight = torch.arange(heads * filters * channels * 2.0).view(heads * filters, channels, 1, 2)
    by_head = (
        weight.view(heads, filters, channels, 2)
        if grouped
        else weight.view(filters, heads, channels, 2).transpose(0, 1)
    )
    blocks = [block.permute(1, 2, 0).flatten() for head in by_head for block in (head[:16], head[16:])]
    assert torch.equal(pack_weight(weight, heads, grouped).flatten(), torch.cat(blocks))


@pytest.fixture
def not_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_library()
    yield tmp_path / "dgc_fastai"
    forget_library()


def forget_library():
    kernel.library.cache_clear()
    kernel.function.cache_clear()


@needs_compiler
@pytest.mark.parametrize("flags", [["-O1"], ["-O1", "-DDGC_WIDE_VECTORS"]], ids=["portable", "512 bits"])
def test_vectors_of_other_processors(not_built, monkeypatch, flags):
    monkeypatch.setattr(build, "VECTORS", {torch.backends.cpu.get_cpu_capability(): flags})
    random_layers.training_agrees(300)
    random_layers.inference_agrees(100)
    random_layers.blocks_agree(60)
    random_layers.group_convolutions_agree(100)
    random_layers.stems_agree(30)


@needs_compiler
def test_built_once_and_nothing_else_is_left(not_built, monkeypatch):
    assert kernel.library() is not None
    (built,) = not_built.iterdir()
    assert built.suffix == ".so"
    forget_library()
    monkeypatch.setattr(subprocess, "run", None)
    assert kernel.library() is not None


@pytest.mark.parametrize(
    "compiler, reason", [("no-such-compiler", "there is no C++ compiler"), ("false", "non-zero exit status")]
)
def test_without_a_compiler_everything_works_and_the_log_says_so_once(not_built, monkeypatch, caplog, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    tensors = case(2, 2, 12, 4, 5, 5, 0.5)
    with caplog.at_level(logging.INFO, "dgc_fastai"), use_backend("cpu"):
        for _ in range(2):
            y = gated_conv2d(*tensors, ONE, NONE, ONE)
    torch.testing.assert_close(y, run("reference", tensors, (ONE, NONE, ONE))[0])
    *building, failure = [record.message for record in caplog.records]
    assert reason in failure and "cannot be built" in failure and "compiler" in failure
    assert len(building) == (compiler == "false") and all("Building the C++ kernel" in line for line in building)
    assert not not_built.exists() or not list(not_built.iterdir())
