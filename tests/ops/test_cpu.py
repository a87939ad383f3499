"""The C++ kernel: every remainder of its blocks, and what happens where it cannot be built."""

import logging
import random
import subprocess
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dgc_fastai.ops.backends import cpu, per_sample
from dgc_fastai.ops.dense import TrainedGroupConv, trains_group_conv
from dgc_fastai.ops.gated_conv2d import gated_conv2d, use_formulation
from dgc_fastai.ops.layer import pack
from dgc_fastai.ops.layer import plain as plain_layer
from helpers.operators import needs_compiler, run

ONE, NONE = (1, 1), (0, 0)


def case(batch, heads, channels, filters, height, width, share, dtype=torch.float32, taps=(1, 1)):
    x, gates = torch.randn(batch, channels, height, width, dtype=dtype), torch.rand(batch, heads, channels, dtype=dtype)
    gates = (gates + 0.1) * (torch.rand(batch, heads, channels) < share)
    tensors = x, gates, torch.randn(heads * filters, channels, *taps, dtype=dtype)
    return [part.requires_grad_() for part in tensors] + [None, None]


def agree(tensors, stride=ONE, padding=NONE, dilation=ONE):
    geometry = stride, padding, dilation
    assert cpu.takes(tensors[0], tensors[2])
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
    with use_formulation(name):
        return gated_conv2d(*tensors, *geometry)


def plain(x, gates, weight, stride, padding, dilation):
    """The definition once more, a convolution a head, in which a dropped channel is not there at all."""
    heads = gates.shape[1]
    parts = []
    for head in range(heads):
        gate = gates[:, head, :, None, None]
        inputs = torch.where(gate == 0, 0, x * gate)
        parts.append(F.conv2d(inputs, weight[head::heads], None, stride, padding, dilation))
    return torch.stack(parts, 2).flatten(1, 2)


def random_case(draw):
    """Tensors and geometry of a layer that nobody would build, and how it is odd."""

    def sides(choices):
        return draw.choice(choices), draw.choice(choices)

    while True:
        taps, stride = sides([1, 1, 2, 3, 3, 3, 5]), sides([1, 1, 1, 2, 2, 3])
        padding, dilation = sides([0, 0, 1, 1, 2, 4]), sides([1, 1, 1, 2, 3])
        height, width = draw.randint(1, 20), draw.randint(1, 36)
        batch, heads, channels = draw.randint(0, 3), draw.randint(1, 8), draw.choice([1, 2, 3, 5, 8, 16, 29, 64])
        filters = draw.choice([1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 37])
        shape = (batch, channels, height, width), (heads * filters, channels, *taps), stride, padding, dilation
        if min(per_sample.output_shape(*shape)[2:]) > 0:
            break
    dtype = draw.choice([torch.float32, torch.float64])
    x, weight = torch.randn(shape[0], dtype=dtype), torch.randn(shape[1], dtype=dtype)
    gates = torch.rand(batch, heads, channels, dtype=dtype) + 0.1
    setting = draw.choice(["some kept", "some kept", "all kept", "one kept", "none kept", "all equal", "not finite"])
    if setting in ("some kept", "not finite"):
        gates *= torch.rand_like(gates) < draw.random()
    elif setting == "one kept":
        gates *= F.one_hot(torch.randint(channels, gates.shape[:2]), channels)
    elif setting == "none kept":
        gates.zero_()
    elif setting == "all equal":
        gates.fill_(0.7)
    if setting == "not finite":
        for value in (float("nan"), float("inf"), -float("inf")):
            x[torch.rand_like(x) < 0.01] = value
    return x, gates, weight, shape[2:], setting


@needs_compiler
def test_2000_random_layers():
    """Nothing may be read or written out of bounds either, which AddressSanitizer tells if pytest -n0 is run with
    CXXFLAGS=-fsanitize=address, the same as LDFLAGS, ASAN_OPTIONS=detect_leaks=0 and
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"."""
    agree_on_random_layers(2000)


def agree_on_random_layers(count):
    draw = random.Random(0)
    torch.manual_seed(0)
    for number in range(count):
        x, gates, weight, geometry, setting = random_case(draw)
        expected = plain(x, gates, weight, *geometry)
        y = cpu.forward(x, gates, weight, *geometry)
        close = partial(_close, number, setting)
        close(y, expected)
        grad = torch.randn_like(y)
        found = cpu.backward(grad, x, gates, weight, *geometry)
        if setting != "not finite":  # gradients spread over whole tensors then
            leaves = [part.requires_grad_() for part in (x, gates, weight)]
            for ours, theirs in zip(found, torch.autograd.grad(plain(*leaves, *geometry), leaves, grad)):
                close(ours, theirs)


def _close(number, setting, ours, theirs):
    limit = 1e-5 if ours.dtype == torch.float32 else 1e-12
    scale = max(1.0, float(theirs.detach().nan_to_num(0, 0, 0).abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=limit,
        atol=limit * scale,
        equal_nan=True,
        msg=lambda message: f"layer {number}, {setting}, {tuple(theirs.shape)}: {message}",
    )


@needs_compiler
def test_200_random_group_convolutions():
    group_convolutions_agree(200)


def group_convolutions_agree(count):
    draw = random.Random(2)
    torch.manual_seed(2)
    for _ in range(count):
        dtype = draw.choice([torch.float32, torch.float64])
        groups, taps = draw.randint(2, 6), (draw.choice([1, 2, 3, 5]), draw.choice([1, 3, 4]))
        stride, dilation = (draw.randint(1, 3), draw.randint(1, 2)), (draw.randint(1, 2), draw.randint(1, 3))
        padding, size = (draw.randint(0, 3), draw.randint(0, 2)), (draw.randint(9, 20), draw.randint(10, 30))
        x = torch.randn(draw.randint(0, 3), groups * draw.choice([1, 2, 5, 8, 32]), *size, dtype=dtype)
        filters = groups * draw.choice([1, 2, 3, 4, 9, 16, 33])
        weight = torch.randn(filters, x.shape[1] // groups, *taps, dtype=dtype)
        leaves = x.requires_grad_(), weight.requires_grad_()
        assert trains_group_conv(*leaves, groups)
        expected = F.conv2d(*leaves, None, stride, padding, dilation, groups)
        y = TrainedGroupConv.apply(*leaves, groups, stride, padding, dilation)
        grad = torch.randn_like(y)
        parts = (y, *torch.autograd.grad(y, leaves, grad)), (expected, *torch.autograd.grad(expected, leaves, grad))
        for ours, theirs in zip(*parts):
            limit = 1e-5 if dtype == torch.float32 else 1e-12
            scale = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
            torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit * scale)


@needs_compiler
def test_200_random_layers_by_winograd():
    """Against the definition; beside them the same layers as they are without, and both with what a shortcut brings."""
    layers_by_winograd_agree(200)


def layers_by_winograd_agree(count):
    draw = random.Random(1)
    torch.manual_seed(1)
    for number in range(count):
        dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        small = cpu.sums_type(dtype)
        batch, heads, channels = draw.randint(0, 3), draw.randint(1, 4), draw.choice([1, 2, 5, 8, 29, 64, 130])
        columns, padding, dilation = (
            draw.randint(1, 4),
            (draw.randint(0, 4), draw.randint(0, 3)),
            (1, draw.randint(1, 3)),
        )
        height, width = draw.randint(3, 20), draw.randint((columns - 1) * dilation[1] + 1, 36)
        weight = torch.randn(heads * draw.choice([1, 3, 4, 5, 13, 16, 17, 32, 37]), channels, 3, columns, dtype=dtype)
        x = torch.randn(batch, channels + 2, height, width, dtype=dtype)[:, 1:-1]
        norm = (
            (torch.rand(channels, dtype=small), torch.randn(channels, dtype=small))
            if draw.random() < 0.5
            else (None, None)
        )
        bias, rectify = torch.randn(len(weight), dtype=small) if draw.random() < 0.5 else None, draw.random() < 0.5
        squeeze, excite = torch.randn(heads, 3, channels, dtype=small), torch.randn(heads, channels, 3, dtype=small)
        gating = squeeze, excite, torch.rand(heads, channels, dtype=small), torch.tensor(draw.randint(0, channels))
        geometry = ONE, padding, dilation
        expected = plain_layer(x, *norm, *gating, weight, bias, False, *geometry).double()
        filters, by_winograd, excite = pack(weight, squeeze, excite, ONE, dilation)
        assert by_winograd.numel() == 2 * filters.numel() == 2 * weight.numel()
        gating = squeeze, excite, *gating[2:]
        residual = torch.randn_like(expected).to(dtype) if draw.random() < 0.5 else None
        rest = bias, rectify, weight.shape, *geometry, residual
        ys = [cpu.layer(x, *norm, *gating, filters, table, *rest) for table in (by_winograd, filters.new_empty(0))]
        if dtype == torch.float64:  # in which the definition has no gates
            expected = cpu.layer(x, *norm, *gating, filters, filters.new_empty(0), bias, False, *rest[2:-1])
        if residual is not None:
            expected += residual
        if rectify:
            expected = expected.relu()
        limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        for y in ys:
            torch.testing.assert_close(
                y.double(), expected, rtol=0, atol=limit * scale,
                msg="layer {}, {}, {}, {}: {{}}".format(number, dtype, tuple(x.shape), tuple(weight.shape)).format,
            )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("weight, stride, dilation, pays", [
    ((64, 64, 3, 3), ONE, ONE, True), ((8, 8, 3, 1), ONE, (1, 2), True), ((512, 512, 3, 3), ONE, ONE, False),
    ((64, 64, 3, 3), (2, 2), ONE, False), ((64, 64, 3, 3), ONE, (2, 2), False), ((64, 64, 1, 1), ONE, ONE, False),
])  # fmt: skip
def test_where_winograd_pays(weight, stride, dilation, pays):
    assert cpu.winograd_pays(weight, stride, dilation) == pays


@needs_compiler
def test_bfloat16_is_float32_rounded():
    x, gates, weight, _, _ = case(3, 2, 12, 20, 7, 6, 0.6, taps=(3, 3))
    x, weight = x.detach().bfloat16(), weight.detach().bfloat16()
    geometry = (1, 1), (1, 1), (1, 1)
    assert cpu.takes(x, weight)
    y = cpu.forward(x, gates.detach(), weight, *geometry)
    exact = cpu.forward(x.float(), gates.detach(), weight.float(), *geometry)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0, atol=0)
    found = cpu.backward(y, x, gates.detach(), weight, *geometry)
    expected = cpu.backward(y.float(), x.float(), gates.detach(), weight.float(), *geometry)
    for part, other in zip(found, expected):
        torch.testing.assert_close(part, other.to(part.dtype), rtol=0, atol=0)
    assert [part.dtype for part in found] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_takes_only_what_it_is_made_for():
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(4, 8, 1, 1)
    assert not cpu.takes(x.half(), weight.half())
    assert not cpu.takes(x, weight.double())  # whose bits would be read as others
    assert not cpu.takes(x.contiguous(memory_format=torch.channels_last), weight)
    assert not cpu.takes(x.to("meta"), weight.to("meta"))


@pytest.fixture
def not_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_library()
    yield tmp_path / "dgc_fastai"
    forget_library()


def forget_library():
    cpu.library.cache_clear()
    cpu._function.cache_clear()


@needs_compiler
@pytest.mark.parametrize("flags", [["-O1"], ["-O1", "-DDGC_WIDE_VECTORS"]], ids=["portable", "512 bits"])
def test_vectors_of_other_processors(not_built, monkeypatch, flags):
    monkeypatch.setattr(cpu, "VECTORS", {torch.backends.cpu.get_cpu_capability(): flags})
    agree_on_random_layers(300)
    layers_by_winograd_agree(100)
    group_convolutions_agree(100)


@needs_compiler
def test_built_once_and_nothing_else_is_left(not_built, monkeypatch):
    assert cpu.library() is not None
    (built,) = not_built.iterdir()
    assert built.suffix == ".so"
    forget_library()
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
    *building, failure = [record.message for record in caplog.records]
    assert reason in failure and "cannot be built" in failure and "compiler" in failure
    assert len(building) == (compiler == "false") and all("Building the C++ kernel" in line for line in building)
    assert not not_built.exists() or not list(not_built.iterdir())
