"""Every backend of the operator against its definition, and the definition against plain sums."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dgc_fastai.ops import BACKENDS, gated_conv2d, operator, reference, selection, use_backend
from dgc_fastai.ops.conv_desc import conv_desc
from dgc_fastai.ops.precision import products_like_convolutions
from helpers.operators import run

ONE, NONE = (1, 1), (0, 0)
OWN = [
    name for name, backend in BACKENDS.items() if name != "reference" and not backend.uses_triton
]  # Triton has tests of its own


def random_case(seed, dtype=torch.float32):
    """Input, gates (some zero), weight, perhaps a norm, and the geometry of a random layer."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, channels, kernel = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 40), rng.choice([1, 1, 2, 3])
    padding = rng.choice([NONE, (kernel // 2, kernel // 2), (1, 0)])
    geometry = rng.choice([ONE, ONE, (2, 2), (2, 1), (3, 2)]), padding, rng.choice([ONE, ONE, (2, 1)])
    x = torch.randn(batch, channels, rng.randint(5, 11), rng.randint(5, 11), dtype=dtype)
    if rng.random() < 0.4:
        x = x.contiguous(memory_format=torch.channels_last)
    gates = torch.rand(batch, heads, channels, dtype=dtype) * (torch.rand(batch, heads, channels) < rng.random())
    weight = torch.randn(heads * rng.randint(1, 8), channels, kernel, kernel, dtype=dtype)
    norm = (torch.rand(channels) + 0.5, torch.randn(channels)) if rng.random() < 0.4 else (None, None)
    tensors = [x, gates, weight, *(part if part is None else part.to(dtype) for part in norm)]
    return [part if part is None else part.requires_grad_() for part in tensors], geometry


@pytest.mark.parametrize("backend", OWN + ["reference"])
def test_gradients_are_the_function_s_and_dropped_gates_get_none(backend):
    kept = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [0, 1, 1]]).view(2, 2, 3)
    for kernel, stride, norm in ((1, ONE, True), (1, (2, 2), False), (3, (2, 1), True), (3, ONE, False)):
        x, raw = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.rand(2, 2, 3, dtype=torch.float64) + 0.1
        weight = torch.randn(4, 3, kernel, kernel, dtype=torch.float64)
        tensors = [x, raw, weight] + [torch.rand(3, dtype=torch.float64) + 0.5 for _ in range(2 * norm)]
        geometry = stride, (kernel // 2, kernel // 2), ONE

        def function(x, raw, weight, scale=None, shift=None, geometry=geometry):
            return gated_conv2d(x, raw * kept, weight, scale, shift, *geometry)

        with use_backend(backend):
            assert torch.autograd.gradcheck(function, [part.requires_grad_() for part in tensors], fast_mode=True)
            gates = (raw * kept).detach().requires_grad_()
            gated_conv2d(x, gates, weight, None, None, *geometry).square().sum().backward()
        assert torch.equal(gates.grad != 0, kept.bool())


@pytest.mark.parametrize("seed", [0, 3, 4, 7])
def test_is_a_well_behaved_operator(seed):
    tensors, geometry = random_case(seed)
    torch.library.opcheck(torch.ops.dgc_fastai.gated_conv2d, (*tensors, *geometry))


def test_second_derivatives_are_refused():
    (x, gates, weight, *_), geometry = random_case(0)
    y = gated_conv2d(x, gates, weight, None, None, *geometry)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dx.sum().backward()
    with use_backend("reference"):
        y = gated_conv2d(x, gates, weight, None, None, *geometry)
        torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("backend", OWN)
def test_keeps_the_input_and_the_gates_and_nothing_larger(backend):
    x, gates = torch.randn(2, 16, 8, 8, requires_grad=True), torch.rand(2, 4, 16, requires_grad=True)
    weight = torch.randn(8, 16, 3, 3, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), use_backend(backend):
        y = gated_conv2d(x, gates, weight, None, None, ONE, ONE, ONE)
    assert y.requires_grad
    assert sum(kept.values()) == 4 * (x.numel() + gates.numel() + weight.numel())


def test_gathered_multiplies_kept_channels_only():
    x, weight = torch.randn(2, 64, 6, 6), torch.randn(8, 64, 1, 1)
    gates = torch.rand(2, 2, 64) + 0.1
    gates[:, :, 16:] = 0
    grad, desc = torch.randn(2, 8, 6, 6), conv_desc(x.shape, weight.shape, 2, ONE, NONE, ONE)
    counts = []
    for part in (gates, torch.ones_like(gates)):
        with FlopCounterMode(display=False) as counter:
            BACKENDS["gathered"].forward(desc, x, part, weight)
            BACKENDS["gathered"].backward(desc, grad, x, part, weight)
        counts.append(counter.get_total_flops())
    assert counts[0] * 4 == counts[1] == 3 * 2 * 2 * 8 * 64 * 36


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_kept_channels(device):
    x, weight = torch.randn(2, 12, 9, 9, device=device), torch.randn(8, 12, 3, 3, device=device)
    gates = (torch.arange(2 * 4 * 12) % 3 == 0).float().view(2, 4, 12).to(device)  # a third; shapes alone tell nothing
    share = 1 if device == "meta" else 1 / 3
    dense = 2 * (2 * 8 * 5 * 5) * 12 * 9
    tensors = [part.requires_grad_() for part in (x, gates, weight)]
    with FlopCounterMode(display=False) as counter:
        y = gated_conv2d(*tensors, None, None, (2, 2), ONE, ONE)
        assert counter.get_total_flops() == round(dense * share)
        y.sum().backward()
    assert counter.get_total_flops() == 3 * round(dense * share)


def geometry_of(batch, channels, side, outputs, kernel=1, stride=1):
    padding = (kernel // 2, kernel // 2)
    return conv_desc(
        (batch, channels, side, side), (outputs, channels, kernel, kernel), 4, (stride, stride), padding, ONE
    )


@pytest.mark.parametrize(
    "geometry, kept, device, expected",
    [
        # densenet86's layers, open, half closed, closed
        (geometry_of(64, 72, 32, 32), 72, "cpu", "scaled_weights"),
        (geometry_of(64, 72, 32, 32), 45, "cpu", "scaled_weights"),
        (geometry_of(64, 72, 32, 32), 18, "cpu", "scaled_weights"),
        (geometry_of(64, 240, 16, 64), 60, "cpu", "gathered"),
        (geometry_of(64, 576, 8, 128), 576, "cpu", "scaled_weights"),
        (geometry_of(64, 576, 8, 128), 288, "cpu", "scaled_weights"),
        (geometry_of(64, 576, 8, 128), 144, "cpu", "gathered"),
        # resnet18's
        (geometry_of(16, 64, 56, 64, 3), 64, "cpu", "scaled_weights"),
        (geometry_of(16, 64, 56, 64, 3), 29, "cpu", "gathered"),
        (geometry_of(16, 64, 56, 128, 3, 2), 29, "cpu", "scaled_weights"),
        (geometry_of(16, 256, 14, 256, 3), 256, "cpu", "scaled_inputs"),
        (geometry_of(16, 256, 14, 256, 3), 115, "cpu", "gathered"),
        (geometry_of(16, 512, 7, 512, 3), 230, "cpu", "scaled_inputs"),
        # no whole vectors of a head's filters
        (geometry_of(16, 64, 56, 24, 3), 16, "cpu", "scaled_weights"),
        # where the count of kept channels is not to be had
        (geometry_of(64, 72, 32, 32), None, "cuda", "scaled_weights"),
        (geometry_of(64, 64, 2, 32), None, "cuda", "scaled_inputs"),
        (geometry_of(16, 64, 56, 64, 3), None, "cuda", "scaled_inputs"),
    ],
)
def test_the_choice_follows_the_shapes(geometry, kept, device, expected):
    assert selection.fastest_backend(geometry, kept, device) == expected


def test_the_compiled_kernel_is_chosen_for_gates_half_closed():
    for geometry in (geometry_of(64, 240, 16, 64), geometry_of(8, 1500, 7, 512)):
        channels = geometry.channels
        assert selection.fastest_backend(geometry, round(0.53 * channels), has_kernel=True) == "cpu"
        assert selection.fastest_backend(geometry, round(0.6 * channels), has_kernel=True) != "cpu"


@pytest.mark.parametrize(
    "inactive, compiled, expected", [(0, True, "scaled_weights"), (56, False, "gathered"), (56, True, "cpu")]
)
def test_the_choice_is_what_runs(monkeypatch, inactive, compiled, expected):
    x, weight = torch.randn(2, 64, 16, 16, requires_grad=True), torch.randn(32, 64, 1, 1)
    gates, ran = torch.rand(2, 4, 64) + 0.1, []
    gates[:, :, :inactive] = 0
    monkeypatch.setattr(BACKENDS["cpu"], "is_supported", lambda *args: compiled)
    for name, backend in BACKENDS.items():
        stand_in = BACKENDS["scaled_weights"] if name == "cpu" else backend  # there may be no compiler here
        for direction in ("forward", "backward"):
            original = getattr(stand_in, direction)
            spy = lambda *args, n=name, d=direction, f=original: (ran.append((n, d)), f(*args))[1]  # noqa: E731
            monkeypatch.setattr(backend, direction, spy)
    gated_conv2d(x, gates, weight, None, None, ONE, NONE, ONE).sum().backward()
    assert [each for each in ran if each[0] == expected] == [(expected, "forward"), (expected, "backward")]
    assert ran[0] == (expected, "forward")


def test_an_unknown_backend_is_refused_and_a_known_one_ends_with_its_context():
    with pytest.raises(ValueError, match="no backend 'fast'; there are reference, "), use_backend("fast"):
        pass
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert selection._forced is None


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float32(backend, dtype):
    for seed in range(20):
        (*tensors, _, _), geometry = random_case(seed)
        tensors += [None, None]  # a ReLU's input that is rounded to the other side of zero is another matter
        exact = run(backend, tensors, geometry)
        with torch.autocast("cpu", dtype=dtype):
            low = run(backend, tensors, geometry)
        assert low[0].dtype == dtype
        assert all(part.dtype == torch.float32 for part in low[1:])
        for ours, theirs in zip(low, exact, strict=True):
            limit = 2e-2 * max(1.0, float(theirs.detach().abs().max()))
            torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=limit)


def test_autocast_leaves_the_gates_alone(monkeypatch):
    seen = []
    chosen = BACKENDS["scaled_inputs"]
    monkeypatch.setattr(operator, "select_backend", lambda desc, *args: seen.append(args) or chosen)
    tensors, geometry = random_case(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gated_conv2d(*tensors, *geometry)
    assert [part.dtype for part in seen[0][:3]] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_products_that_stand_for_convolutions_take_their_precision(monkeypatch):
    products, inside = torch.backends.cuda.matmul, []
    before = products.fp32_precision
    with FakeTensorMode():  # there may be no GPU
        x = torch.empty(1, device="cuda")
    for part in (x, x.bfloat16(), torch.empty(1)):
        with products_like_convolutions(part):
            inside.append(products.fp32_precision)
    assert inside == [torch.backends.cudnn.conv.fp32_precision, before, before] and products.fp32_precision == before


def test_any_backend_can_be_used_and_what_it_does_not_support_is_computed_by_another():
    class Picky(type(BACKENDS["scaled_inputs"])):
        name, ran = "picky", 0

        def is_supported(self, desc, x, weight):
            return desc.is_pointwise

        def forward(self, *args):
            self.ran += 1
            return super().forward(*args)

    picky, x, gates = Picky(), torch.randn(2, 6, 5, 5), torch.rand(2, 2, 6)
    with use_backend(picky):
        for side in (1, 3):
            weight = torch.randn(4, 6, side, side)
            expected = reference.gated_conv2d(x, gates, weight, None, None, ONE, NONE, ONE)
            torch.testing.assert_close(gated_conv2d(x, gates, weight, None, None, ONE, NONE, ONE), expected)
    assert picky.ran == 1


@pytest.mark.parametrize(
    "x, weight, heads, message",
    [((1, 5, 4, 4), (4, 6, 1, 1), 2, "channels"), ((1, 6, 4, 4), (4, 6, 1, 1), 3, "divide")],
)
def test_shapes_that_do_not_agree_are_refused(x, weight, heads, message):
    with pytest.raises(ValueError, match=message):
        gated_conv2d(torch.randn(x), torch.rand(1, heads, x[1]), torch.randn(weight), None, None, ONE, NONE, ONE)
