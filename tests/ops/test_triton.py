"""The Triton kernels against the definition: on a GPU where there is one, in Triton's interpreter elsewhere."""

import dataclasses
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.golden import LAYERS, check_golden_layer, close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from triton.runtime import interpreter  # noqa: E402

from dgc_fastai.ops import use_backend  # noqa: E402
from dgc_fastai.ops.backends import triton_kernels as cuda  # noqa: E402

ONE = (1, 1)
NAMES = ("y", "dx", "dgates", "dweight", "dscale", "dshift")


def readable(handle):
    """The interpreter keeps bfloat16 as the integers of its bits, and a product would multiply these."""
    if handle.dtype != interpreter.tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)


@pytest.fixture(autouse=True)
def better_interpreter(monkeypatch):
    """With products of bfloat16, and without the checks for overflow, which take half of the time."""
    if DEVICE == "cpu":
        interpreted = isinstance(cuda.tl.cdiv, interpreter.InterpretedFunction)
        assert interpreted, "something imported Triton before TRITON_INTERPRET was set"
        builder = interpreter.interpreter_builder
        create_dot = builder.create_dot
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        monkeypatch.setattr(builder, "create_dot", lambda a, b, *rest: create_dot(readable(a), readable(b), *rest))


def definition(x, gates, weight, scale, shift, *geometry):
    """[B, O, H', W'] as the docstring of the kernels says it, one head after the other."""
    heads = gates.shape[1]
    u = x if scale is None else F.relu(x * scale[:, None, None] + shift[:, None, None])
    outputs = [F.conv2d(u * gates[:, h, :, None, None], weight[h::heads], None, *geometry) for h in range(heads)]
    return torch.stack(outputs, dim=2).flatten(1, 2)


def expected(grad, inputs, geometry):
    """What `results` should give, in float64: a GPU's convolutions may use TF32 for float32."""
    inputs = [tensor.double().requires_grad_() for tensor in inputs if tensor is not None]
    norm = inputs[3:] or (None, None)
    y = definition(*inputs[:3], *norm, *geometry)
    grads = list(torch.autograd.grad(y, inputs, grad.double()))
    grads[1] = grads[1] * (inputs[1] != 0)
    return [y.detach(), *grads, *[None] * (5 - len(inputs))]


def results(inputs, geometry, reshape=lambda grad: grad):
    """The output's gradient, and the kernels' output and gradients."""
    y = cuda.forward(*inputs, *geometry)
    grad = reshape(torch.randn_like(y))
    return grad, [y, *cuda.backward(grad, *inputs, *geometry)]


def check(inputs, geometry, tolerance=1e-5, **keywords):
    grad, ours = results(inputs, geometry, **keywords)
    types = [inputs[0].dtype] * 2 + [torch.float32, inputs[0].dtype] + [torch.float32] * 2
    for name, got, wanted, dtype in zip(NAMES, ours, expected(grad, inputs, geometry), types):
        assert (got is None) == (wanted is None), name
        if got is not None:
            assert got.dtype == dtype and got.shape == wanted.shape, name
            try:
                close(got.double(), wanted, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
    return ours


def make_case(
    seed=0,
    batch=2,
    heads=2,
    channels=5,
    filters=3,
    size=(6, 5),
    kernel=ONE,
    stride=ONE,
    padding=(0, 0),
    dilation=ONE,
    keep=0.5,
    norm=True,
    dtype=torch.float32,
    last=False,
):
    """The five inputs of a layer, and its stride, padding and dilation."""
    torch.manual_seed(seed)
    x = torch.randn(batch, channels, *size).to(DEVICE, dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    gates = (torch.rand(batch, heads, channels) + 0.1) * (torch.rand(batch, heads, channels) < keep)
    weight = torch.randn(filters * heads, channels, *kernel).to(DEVICE, dtype)
    scale, shift = torch.randn(2, channels).to(DEVICE) if norm else (None, None)
    return [x, gates.to(DEVICE), weight, scale, shift], (stride, padding, dilation)


def random_case(seed, **fixed):
    rng = random.Random(seed)
    kernel = rng.choice([ONE, ONE, (3, 3), (2, 2), (2, 3)])
    chosen = {
        "kernel": kernel,
        "stride": rng.choice([ONE, ONE, (2, 2), (2, 1), (1, 3)]),
        "padding": rng.choice([(0, 0), (kernel[0] // 2, kernel[1] // 2), (1, 2)]),
        "dilation": rng.choice([ONE, ONE, (2, 2), (1, 2)]),
        "batch": rng.randint(1, 2),
        "heads": rng.randint(1, 3),
        "channels": rng.choice([2, 5, 16, 19, 40]),
        "filters": rng.choice([1, 3, 8, 17]),
        "size": (rng.randint(5, 7), rng.randint(5, 8)),
        "keep": rng.choice([0.25, 0.5, 0.9]),
        "norm": rng.random() < 0.6,
        "last": rng.random() < 0.4,
    }
    return make_case(seed, **chosen | fixed)


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definition_on_random_layers(seed):
    check(*random_case(seed))


@pytest.mark.parametrize(
    "case",
    [
        {"heads": 1, "keep": 1, "kernel": (3, 3), "padding": ONE},
        {"keep": 1, "norm": False, "stride": (2, 2)},
        {"keep": 0},
        {"padding": (1, 2)},
        {"channels": 70, "keep": 0.95, "size": (2, 3), "norm": False},
        {"kernel": (3, 3), "padding": (2, 2), "dilation": (2, 2), "stride": (2, 2), "size": (7, 7)},
        {"batch": 1, "heads": 1, "channels": 1, "filters": 1, "size": ONE, "keep": 1},
    ],
)
def test_equals_the_definition_on_special_layers(case):
    check(*make_case(**case))


def test_an_empty_batch():
    inputs, geometry = make_case(batch=0, kernel=(2, 3))
    y, dx, dgates, *rest = results(inputs, geometry)[1]
    assert y.shape == (0, 6, 5, 3) and dx.shape == inputs[0].shape and dgates.shape == inputs[1].shape
    assert not any(gradient.any() for gradient in rest)


def test_equals_the_definition_over_many_tiles(monkeypatch):
    monkeypatch.setattr(cuda, "_block", lambda size, most: 16)
    check(*make_case(channels=37, filters=18, keep=0.7))
    check(*make_case(channels=18, filters=17, heads=1, keep=0.9, kernel=(1, 3), padding=(0, 1), last=True))
    # One program sums several samples, and their number is no multiple of its share.
    monkeypatch.setattr(cuda, "PROGRAMS", 4)
    check(*make_case(batch=3, size=(3, 3)))


def test_padding_comes_after_the_norm():
    inputs, geometry = make_case(kernel=(3, 3), padding=ONE, size=(3, 3))
    inputs[4] = inputs[4].abs() + 3  # a padded zero would become a large number
    check(inputs, geometry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20, 22))
def test_low_precision_stays_near_the_definition(dtype, seed):
    check(*random_case(seed, dtype=dtype), tolerance=2e-2)


@pytest.mark.parametrize(
    "reshape",
    [
        lambda grad: grad.contiguous(memory_format=torch.channels_last),
        lambda grad: grad[:, :1, :1, :1].expand_as(grad),
        lambda grad: grad.transpose(2, 3).contiguous().transpose(2, 3),
    ],
)
def test_strides_of_the_gradient_do_not_matter(reshape):
    check(*make_case(), reshape=reshape)


@pytest.mark.parametrize("kernel", [ONE, (2, 2)])
def test_strides_of_the_input_and_the_weight_do_not_matter(kernel):
    inputs, geometry = make_case(kernel=kernel, size=(4, 5))
    plain = check(inputs, geometry)
    x, gates, weight = inputs[:3]
    inputs[0] = x.repeat(1, 2, 2, 2)[:, : x.shape[1], : x.shape[2], : x.shape[3]]
    inputs[1] = gates.transpose(1, 2).contiguous().transpose(1, 2)
    inputs[2] = weight.contiguous(memory_format=torch.channels_last)
    inputs[3] = inputs[3].repeat_interleave(2)[::2]
    for name, ours, theirs in zip(NAMES[:2], check(inputs, geometry), plain):
        assert torch.equal(ours, theirs) or name == "dx"  # the gradient given is another one


def test_the_output_is_channels_last_where_the_input_is():
    for last in (False, True):
        inputs, geometry = make_case(last=last)
        y = cuda.forward(*inputs, *geometry)
        dx = cuda.backward(y, *inputs, *geometry)[0]
        memory_format = torch.channels_last if last else torch.contiguous_format
        assert y.is_contiguous(memory_format=memory_format) and dx.is_contiguous(memory_format=memory_format)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("norm, poison", [(False, float("nan")), (True, float("nan")), (True, float("inf"))])
def test_dropped_channels_are_never_looked_at(norm, poison):
    inputs, geometry = make_case(channels=7, keep=1, norm=norm, kernel=(1, 3), padding=(0, 1), size=(4, 5))
    x, gates, weight, scale, shift = inputs
    gates[:, :, 2] = 0  # by all heads
    gates[:, 0, 4] = 0  # by one
    clean = check(inputs, geometry)
    x[:, 2] = poison
    weight[:, 2] = weight[0::2, 4] = poison
    if norm:
        scale[2] = shift[2] = poison
    torch.manual_seed(1)
    grad, poisoned = results(inputs, geometry)
    assert torch.equal(poisoned[0], clean[0])
    for name, gradient in zip(NAMES, poisoned):
        assert gradient is None or gradient.isfinite().all(), name
    # Nor does anything else, be it the gradient, get into theirs.
    for gradients in (poisoned[1:], cuda.backward(torch.full_like(grad, poison), *inputs, *geometry)):
        dx, dgates, dweight = gradients[:3]
        assert not dx[:, 2].any() and not dgates[gates == 0].any()
        assert not dweight[:, 2].any() and not dweight[0::2, 4].any()


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter does")
@pytest.mark.parametrize("kept, expected", [(64, 12), (32, 6), (16, 3), (1, 3), (0, 0)])
def test_work_is_in_proportion_to_the_channels_kept(monkeypatch, kept, expected):
    builder, products = interpreter.interpreter_builder, []
    create_dot = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *args: (products.append(1), create_dot(*args))[1])
    monkeypatch.setattr(cuda, "_block", lambda size, most: 16)
    inputs, geometry = make_case(batch=1, heads=1, channels=64, size=(4, 4), keep=1)
    inputs[1][:, :, kept:] = 0
    results(inputs, geometry)
    assert len(products) == expected


def test_runs_give_the_same_bits():
    inputs, geometry = make_case(kernel=(1, 2), channels=20)
    grad = torch.randn_like(cuda.forward(*inputs, *geometry))
    first, second = (cuda.backward(grad, *inputs, *geometry) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation gave."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_no_copy_of_the_input_is_made_per_head():
    inputs, geometry = make_case(heads=4, filters=1, channels=16, size=(9, 9))
    with Largest() as largest:
        cuda.backward(cuda.forward(*inputs, *geometry), *inputs, *geometry)
    assert 0 < largest.nbytes <= inputs[0].nbytes


def test_tf32_only_where_pytorch_uses_it():
    found = []
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            settings.fp32_precision = setting
            found.append(cuda._geometry(ONE, ONE, (0, 0), ONE, True)["PRECISION"])
    finally:
        settings.fp32_precision = before
    assert found == ["ieee", "tf32"]


@pytest.mark.parametrize("path", LAYERS[:3], ids=lambda path: path.stem)
def test_a_layer_on_these_kernels_equals_the_reference_s_numbers(path):
    if DEVICE != "cpu":
        pytest.skip("the layers of these tests are on the CPU")
    with use_backend("triton"):
        check_golden_layer(path)
