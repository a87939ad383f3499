"""A layer by the Triton kernels around its convolution against the same layer in plain PyTorch: in Triton's
interpreter, or on a GPU where there is one."""

import copy
import dataclasses
import os

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from triton.runtime import interpreter  # noqa: E402

from dgc_fastai import DynamicGroupConv2d, gate_penalty  # noqa: E402
from dgc_fastai.layers.dynamic_group_conv import HeadGates  # noqa: E402
from dgc_fastai.ops import fused_layer, reference, use_backend  # noqa: E402
from dgc_fastai.ops.backends import per_sample, triton_layer  # noqa: E402
from dgc_fastai.ops.backends.base import Gradients  # noqa: E402
from dgc_fastai.ops.backends.scaled_inputs import ScaledInputs  # noqa: E402
from dgc_fastai.ops.gates import drop_smallest, head_gates, pool  # noqa: E402
from helpers.golden import LAYERS, check_golden_layer  # noqa: E402


@pytest.fixture(autouse=True)
def faster_interpreter(monkeypatch):
    """Without the checks for overflow, which take half of the time."""
    if DEVICE == "cpu":
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


class Unfused(ScaledInputs):
    """PyTorch's convolution and norm; Triton's interpreter computes the rest."""

    name, uses_triton = "triton around the convolution", True


class Fused(Unfused):
    """The same with the norm as an operand of the convolution."""

    fuses_norm = True

    def __init__(self, in_parts=True):
        self.in_parts = in_parts

    def forward(self, desc, x, gates, weight, norm=None):
        return super().forward(desc, x if norm is None else reference.apply_norm(x, *norm), gates, weight)

    def backward(self, desc, grad, x, gates, weight, norm=None):
        if norm is None:
            return super().backward(desc, grad, x, gates, weight)
        u = reference.apply_norm(x, *norm)
        du, dgates, dweight, _, _ = super().backward(desc, grad, u, gates, weight)
        du = du.float() * (u > 0)
        scale, shift = (du * x).sum((2, 3)), du.sum((2, 3))
        dx = (du * norm.scale.view(-1, 1, 1)).to(x.dtype)
        if not self.in_parts:
            return Gradients(dx, dgates, dweight, scale.sum(0), shift.sum(0))
        # Sums are left to the kernels: scale and shift by sample, side by side as the Triton kernels have them.
        norm = torch.stack([scale, shift], 1)
        flat = dweight.contiguous(memory_format=per_sample.memory_format(weight)).as_strided((weight.numel(),), (1,))
        return Gradients(dx, halves(dgates), halves(flat.float()), *norm.unbind(1))


def halves(total):
    """Two parts with this sum."""
    return torch.stack([0.25 * total, 0.75 * total])


FUSED = Fused()
BACKENDS = pytest.mark.parametrize("backend", [FUSED, Unfused()], ids=["norm fused", "norm by PyTorch"])


def make_layer(channels=19, out=6, kernel=1, heads=3, squeeze_rate=4, inactive=7, **keywords):
    layer = DynamicGroupConv2d(channels, out, kernel, heads=heads, squeeze_rate=squeeze_rate, **keywords)
    if layer.preact:
        nn.init.uniform_(layer.norm.weight, 0.5, 2), nn.init.normal_(layer.norm.bias)
        nn.init.uniform_(layer.norm.running_var, 0.5, 2), nn.init.normal_(layer.norm.running_mean)
    layer.inactive_channels.fill_(inactive)
    return layer.to(DEVICE)


def make_input(batch=3, channels=19, size=(4, 5), last=False, dtype=torch.float32):
    x = (2 * torch.randn(batch, channels, *size) + 1).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def results(layer, x, backend):
    """By name: the output, penalty, buffers and gradients after a step."""
    layer, x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    with use_backend(backend):
        y = layer(x)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        penalty = 10 * gate_penalty(layer) if layer.training else 0  # as large as the rest
        ((y * upstream).sum() + penalty).backward()
    found = {"y": y, "dx": x.grad, **dict(layer.named_buffers())}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return found | ({"penalty": gate_penalty(layer)} if layer.training else {})


def check(layer, x, backend=FUSED, tolerance=1e-5):
    ours, theirs = results(layer, x, backend), results(layer, x, "reference")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        limit = tolerance * max(1e-3, float(expected.detach().double().abs().max()))
        torch.testing.assert_close(
            found, expected, rtol=0, atol=limit, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    return ours


@pytest.mark.parametrize("backend, last", [(FUSED, False), (FUSED, True), (Unfused(), True)])
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(inactive=0),
        dict(inactive=18),
        dict(channels=16, out=8, heads=4, kernel=3, padding=1, stride=2),
        dict(channels=33, out=5, heads=5, squeeze_rate=16, inactive=20, bias=True),
        dict(channels=4, out=3, heads=1, squeeze_rate=2, inactive=1),
        dict(preact=False),
        dict(channels=40, heads=2, inactive=24, granularity=8),
    ],
    ids=str,
)
def test_equals_the_layer_in_plain_pytorch(case, backend, last):
    layer = make_layer(**case)
    check(layer, make_input(channels=layer.in_channels, last=last), backend)


def test_a_norm_with_running_statistics_and_gates_of_no_interest_to_autograd():
    layer = make_layer()
    layer.norm.eval()
    check(layer, make_input())
    check(layer.eval(), make_input())
    x = make_input()
    for training in (False, True):
        with torch.no_grad(), use_backend(FUSED):
            y = copy.deepcopy(layer).train(training)(x)
        torch.testing.assert_close(y, copy.deepcopy(layer).train(training)(x), rtol=1e-5, atol=1e-5)


def test_sums_that_the_convolution_has_done_itself():
    check(make_layer(kernel=3, padding=1), make_input(last=True), Fused(in_parts=False))


def test_a_recomputed_batch_does_not_count_twice():
    layer = make_layer()
    layer.norm.momentum, layer.norm.num_batches_tracked = 0.0, None  # as `DGCDenseNet` has it meanwhile
    check(layer, make_input())


def test_filters_in_any_layout():
    layer = make_layer(channels=16, out=8, heads=4, kernel=3, padding=1)
    for weight in (
        layer.weight.contiguous(memory_format=torch.channels_last),
        layer.weight.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        layer.weight = nn.Parameter(weight.detach())
        check(layer, make_input(channels=16, last=True))


def test_many_tiles_groups_and_blocks(monkeypatch):
    """Sizes at which each loop in the kernels runs several times, and its last round is not full."""
    layer = make_layer(channels=70, heads=1, squeeze_rate=28, inactive=30)
    monkeypatch.setattr(triton_layer, "TILE", 512)
    monkeypatch.setattr(triton_layer, "PROGRAMS", 3)
    monkeypatch.setattr(triton_layer, "MAX_PARTIALS", 1)
    for last in (False, True):
        check(layer, make_input(batch=9, channels=70, size=(3, 7), last=last), tolerance=3e-5)
    layer = make_layer(channels=4, out=2, heads=1, squeeze_rate=2, inactive=0)
    check(layer, make_input(batch=70, channels=4, size=(1, 3)), tolerance=3e-5)


@BACKENDS
def test_low_precision_stays_near_the_layer_in_float32(backend):
    layer = make_layer(kernel=3, padding=1)
    x = make_input(last=True)
    expected = results(layer, x, "reference")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = results(layer, x.bfloat16(), backend)
    assert (found["y"].dtype, found["dx"].dtype, found["penalty"].dtype) == (torch.bfloat16,) * 2 + (torch.float32,)
    for name, exact in expected.items():
        limit = 5e-2 * max(1e-3, float(exact.detach().abs().max()))
        torch.testing.assert_close(found[name].to(exact.dtype), exact, rtol=0, atol=limit)


def test_weights_in_low_precision_have_gradients_of_their_type():
    layer, x = make_layer().bfloat16(), make_input(dtype=torch.bfloat16)
    for name, found in results(layer, x, FUSED).items():
        assert found.dtype == {"penalty": torch.float32}.get(
            name, torch.bfloat16 if found.is_floating_point() else found.dtype
        )


def select(x, gates, count):
    weights = triton_layer.Gates(gates.squeeze, gates.excite, gates.bias)
    return triton_layer.select(x, weights, torch.tensor(count, device=DEVICE), None)


@pytest.mark.parametrize("count", range(6))
def test_the_selection_is_exact_with_ties_zeros_and_values_that_are_not_numbers(count):
    gates = HeadGates(5, 4, 2).to(DEVICE)
    with torch.no_grad():
        gates.excite.zero_()
        gates.bias.copy_(
            torch.tensor(
                [
                    [0.0, 1.0, 1.0, 2.0, 3.0],  # ties
                    [-1.0, -2.0, -0.0, 1e-40, 2.0],  # closed ones, and the smallest numbers
                    [1.0, torch.nan, 0.5, torch.inf, 2.0],
                    [torch.nan, torch.inf, torch.inf, torch.nan, torch.nan],
                ]
            )
        )
        x = make_input(2, 5)
        expected = head_gates(pool(x), gates.squeeze, gates.excite, gates.bias)
        found = select(x, gates, count)
    assert torch.equal(found.gates.nan_to_num(-1), drop_smallest(expected, torch.tensor(count)).nan_to_num(-1))
    assert torch.equal(found.gates.isnan(), drop_smallest(expected, torch.tensor(count)).isnan())
    torch.testing.assert_close(found.penalty, expected.mean(2) / 2, equal_nan=True)


def test_many_channels_are_selected_one_by_one():
    gates = HeadGates(300, 2, 16).to(DEVICE)
    with torch.no_grad():
        gates.excite.zero_()
        gates.bias.uniform_(0, 1)
        x = make_input(1, 300)
        for count in (1, 150, 299):
            assert (select(x, gates, count).gates != 0).sum(-1).eq(300 - count).all()


def test_features_that_are_not_numbers_show_in_what_depends_on_them():
    layer, x = make_layer(), make_input()
    x[1, 3, 2, 2] = torch.nan
    ours, theirs = results(layer, x, FUSED), results(layer, x, "reference")
    for name in ("y", "penalty", "norm.running_mean", "norm.running_var", "norm.weight"):
        assert torch.equal(ours[name].isnan(), theirs[name].isnan()) and ours[name].isnan().any(), name


def test_a_mean_far_from_zero_takes_no_digits_from_the_variance():
    layer, x = make_layer(channels=4, out=3, squeeze_rate=2, inactive=1), make_input(8, 4, (7, 7))
    layer.norm.momentum = 1.0
    x = x + 3e4
    exact = x.double().var((0, 2, 3))
    with use_backend(FUSED):
        layer(x)
    torch.testing.assert_close(layer.norm.running_var.double(), exact, rtol=1e-4, atol=0)


def test_a_loss_of_the_output_or_of_the_penalty_alone():
    for loss in (lambda y, layer: y.square().sum(), lambda y, layer: gate_penalty(layer)):
        found = []
        for backend in ("reference", FUSED):
            torch.manual_seed(0)
            layer, x = make_layer(), make_input().requires_grad_()
            with use_backend(backend):
                loss(layer(x), layer).backward()
            found.append([x.grad, layer.gates.squeeze.grad, layer.gates.bias.grad, layer.norm.weight.grad])
        for ours, theirs in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_keeps_the_input_and_nothing_as_large(dtype):
    layer, x, kept = make_layer(), make_input(size=(16, 16), dtype=dtype).requires_grad_(), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), use_backend(FUSED):
        y = layer.to(dtype)(x)
    assert [size for size in kept.values() if size >= x.nbytes / 2] == [x.nbytes]
    del y


def test_runs_give_the_same_bits():
    layer, x = make_layer(), make_input(batch=5)
    first, second = (results(layer, x, FUSED) for _ in range(2))
    assert all(torch.equal(ours, second[name]) for name, ours in first.items())


def test_it_leaves_to_pytorch_what_it_cannot_compute(monkeypatch):
    def never(*args):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(triton_layer, "select", never)
    layer, x = make_layer(), make_input()
    with pytest.raises(AssertionError, match="a kernel ran"), use_backend(FUSED):
        layer(x)
    with use_backend(FUSED):
        make_layer().double()(x.double())
        torch.compile(make_layer(), backend="aot_eager", fullgraph=True)(x)
        hooked = make_layer()
        hooked.norm.register_forward_hook(lambda *args: None)
        assert not fused_layer.folds_norm(hooked.norm, x)
        for keywords in (dict(affine=False), dict(momentum=None), dict(track_running_stats=False)):
            layer = make_layer()
            layer.norm = nn.BatchNorm2d(19, **keywords).to(DEVICE)
            assert not fused_layer.folds_norm(layer.norm, x)
    assert not fused_layer.is_supported(make_input(batch=0), layer.gates.squeeze)


def test_operations_are_counted():
    layer, x, counts = make_layer(), make_input(), []
    for backend in (FUSED, "scaled_inputs"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_flop_counts()["Global"][torch.ops.dgc_fastai.gated_conv2d])
    assert counts[0] == counts[1] > 0


def test_one_value_per_channel_is_refused_as_by_pytorch():
    layer = make_layer(channels=4, out=3, squeeze_rate=2)
    assert not fused_layer.folds_norm(layer.norm, make_input(1, 4, (1, 1)))


@pytest.mark.parametrize("path", LAYERS[:2], ids=lambda path: path.stem)
def test_a_layer_equals_the_reference_s_numbers(path):
    if DEVICE != "cpu":
        pytest.skip("the layers of these tests are on the CPU")
    for backend in (FUSED, Unfused()):
        with use_backend(backend):
            check_golden_layer(path)
