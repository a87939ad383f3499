"""The Triton kernels against the definition: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dgc_fastai.ops import BACKENDS, measured, use_backend
from dgc_fastai.ops.conv_desc import conv_desc
from dgc_fastai.ops.precision import convolutions_use_tf32
from helpers.golden import LAYERS, check_golden_layer
from helpers.triton_layers import DEVICE, NAMES, ONE, Kernels, improve_interpreter, make_case, random_case

pytest.importorskip("triton")

from dgc_fastai.ops.backends import triton_kernels, triton_skipping

MODULES = {"triton": triton_kernels, "triton_skipping": triton_skipping}


@pytest.fixture(autouse=True)
def better_interpreter(monkeypatch):
    if DEVICE == "cpu":
        improve_interpreter(monkeypatch)


@pytest.fixture(params=MODULES)
def kernels(request):
    return Kernels(request.param)


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_definition_on_random_layers(kernels, seed):
    kernels.check(*random_case(seed))


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
def test_equals_the_definition_on_special_layers(kernels, case):
    kernels.check(*make_case(**case))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8])
def test_heads_of_any_number(heads):
    case = {"kernel": (3, 3), "padding": ONE, "stride": (2, 2) if heads == 4 else ONE, "last": True}
    Kernels("triton").check(*make_case(heads=heads, filters=2, channels=18, size=(5, 4), **case))


@pytest.mark.parametrize("stride", [(2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("dilation", [ONE, (2, 2), (3, 1)])
def test_each_pixel_gets_the_gradient_of_the_taps_that_reach_it(stride, dilation):
    """Dilations that share a factor with the stride, and those that do not; pixels that no tap reaches."""
    for kernel, padding in (((3, 2), ONE), (ONE, (0, 0))):
        Kernels("triton").check(
            *make_case(size=(8, 7), kernel=kernel, padding=padding, stride=stride, dilation=dilation, heads=3)
        )


def test_an_empty_batch(kernels):
    inputs, geometry = make_case(batch=0, kernel=(2, 3))
    y, dx, dgates, *rest = kernels.results(inputs, geometry)[1]
    assert y.shape == (0, 6, 5, 3) and dx.shape == inputs[0].shape and dgates.shape == inputs[1].shape
    assert not any(gradient.any() for gradient in rest)


def test_equals_the_definition_over_many_tiles(kernels, monkeypatch):
    module = MODULES[kernels.backend.name]
    monkeypatch.setattr(module, "_block", lambda size, most: 16)
    kernels.check(*make_case(channels=37, filters=18, keep=0.7))
    kernels.check(*make_case(channels=18, filters=17, heads=1, keep=0.9, kernel=(1, 3), padding=(0, 1), last=True))
    # One program sums several samples and several tiles of pixels, whose numbers are no multiples of its share.
    monkeypatch.setattr(module, "PROGRAMS", 4)
    kernels.check(*make_case(batch=3, size=(3, 3)))
    kernels.check(*make_case(batch=1, size=(7, 11), kernel=(3, 3), padding=ONE))


def test_padding_comes_after_the_norm(kernels):
    inputs, geometry = make_case(kernel=(3, 3), padding=ONE, size=(3, 3))
    inputs[4] = inputs[4].abs() + 3  # a padded zero would become a large number
    kernels.check(inputs, geometry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20, 22))
def test_low_precision_stays_near_the_definition(kernels, dtype, seed):
    kernels.check(*random_case(seed, dtype=dtype), tolerance=2e-2)


@pytest.mark.parametrize(
    "reshape",
    [
        lambda grad: grad.contiguous(memory_format=torch.channels_last),
        lambda grad: grad[:, :1, :1, :1].expand_as(grad),
        lambda grad: grad.transpose(2, 3).contiguous().transpose(2, 3),
    ],
)
def test_strides_of_the_gradient_do_not_matter(kernels, reshape):
    kernels.check(*make_case(), reshape=reshape)


@pytest.mark.parametrize("kernel", [ONE, (2, 2)])
def test_strides_of_the_input_and_the_weight_do_not_matter(kernels, kernel):
    inputs, geometry = make_case(kernel=kernel, size=(4, 5))
    plain = kernels.check(inputs, geometry)
    x, gates, weight = inputs[:3]
    inputs[0] = x.repeat(1, 2, 2, 2)[:, : x.shape[1], : x.shape[2], : x.shape[3]]
    inputs[1] = gates.transpose(1, 2).contiguous().transpose(1, 2)
    inputs[2] = weight.contiguous(memory_format=torch.channels_last)
    inputs[3] = inputs[3].repeat_interleave(2)[::2]
    for name, ours, theirs in zip(NAMES[:2], kernels.check(inputs, geometry), plain):
        assert torch.equal(ours, theirs) or name == "dx"  # the gradient given is another one


def test_gates_of_heads_side_by_side_are_read_as_they_are(kernels):
    inputs, geometry = make_case()
    inputs[1] = inputs[1].transpose(0, 1).contiguous().transpose(0, 1)  # as `head_gates` gives them
    kernels.check(inputs, geometry)


@pytest.mark.parametrize("last", [False, True])
def test_results_are_laid_out_as_the_arguments(kernels, last):
    inputs, geometry = make_case(last=last, kernel=(2, 2))
    memory_format = torch.channels_last if last else torch.contiguous_format
    inputs[2] = inputs[2].contiguous(memory_format=memory_format)
    y = kernels.forward(*inputs, *geometry)
    dx, _, dweight, *_ = kernels.backward(y, *inputs, *geometry)
    assert all(part.is_contiguous(memory_format=memory_format) for part in (y, dx, dweight))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize("norm, poison", [(False, float("nan")), (True, float("nan")), (True, float("inf"))])
def test_dropped_channels_leave_no_trace(kernels, norm, poison):
    inputs, geometry = make_case(channels=7, keep=1, norm=norm, kernel=(1, 3), padding=(0, 1), size=(4, 5))
    x, gates, weight, scale, shift = inputs
    gates[:, :, 2] = 0  # by all heads
    gates[:, 0, 4] = 0  # by one
    clean = kernels.check(inputs, geometry)
    x[:, 2] = poison
    weight[:, 2] = weight[0::2, 4] = poison
    if norm:
        scale[2] = shift[2] = poison
    torch.manual_seed(1)
    grad, poisoned = kernels.results(inputs, geometry)
    assert torch.equal(poisoned[0], clean[0])
    for name, gradient in zip(NAMES, poisoned):
        assert gradient is None or gradient.isfinite().all(), name
    # Nor does anything else, be it the gradient, get into theirs.
    for gradients in (poisoned[1:], kernels.backward(torch.full_like(grad, poison), *inputs, *geometry)):
        dx, dgates, dweight = gradients[:3]
        assert not dx[:, 2].any() and not dgates[gates == 0].any()
        assert not dweight[:, 2].any() and not dweight[0::2, 4].any()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_reaches_the_heads_that_keep_its_channel_and_no_others(kernels, poison):
    inputs, geometry = make_case(channels=7, keep=1, norm=False)
    inputs[1][:, 0, 4] = 0
    clean = kernels.forward(*inputs, *geometry)
    inputs[0][0, 4, 2, 3] = poison
    y = kernels.forward(*inputs, *geometry)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 1::2, 2, 3] = True
    assert torch.equal(~y.isfinite(), reached) and torch.equal(y[~reached], clean[~reached])


def test_runs_give_the_same_bits(kernels):
    inputs, geometry = make_case(kernel=(1, 2), channels=20)
    grad = torch.randn_like(kernels.forward(*inputs, *geometry))
    first, second = (kernels.backward(grad, *inputs, *geometry) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation gave."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_no_copy_of_the_input_is_made_per_head(kernels):
    inputs, geometry = make_case(heads=4, filters=1, channels=16, size=(9, 9))
    with Largest() as largest:
        kernels.backward(kernels.forward(*inputs, *geometry), *inputs, *geometry)
    assert 0 < largest.nbytes <= inputs[0].nbytes


def test_tf32_where_convolutions_use_it(kernels):
    """Not where matrix products do, which PyTorch decides separately."""
    settings, module, found = torch.backends.cudnn.conv, MODULES[kernels.backend.name], []
    before = settings.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            settings.fp32_precision = setting
            assert convolutions_use_tf32() == (setting == "tf32")
            found.append(module.precision())
    finally:
        settings.fp32_precision = before
    assert found == ["ieee", "tf32"]


@pytest.mark.parametrize("fused", [False, True])
def test_backends_that_are_measured_against_each_other_agree(fused):
    """Or none but the plain one would ever be selected."""
    inputs, geometry = make_case(channels=8, filters=2, heads=4, kernel=(3, 3), padding=ONE, stride=(2, 2), last=True)
    x, gates, weight, *_ = inputs
    desc = conv_desc(x.shape, weight.shape, gates.shape[1], *geometry)
    plain, ours = (measured._step(BACKENDS[name], desc, x, weight, fused)() for name in ("cudnn", "triton"))
    assert measured._largest_error(ours, plain) < 1e-5


@pytest.mark.parametrize("path", LAYERS[:3], ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", MODULES)
def test_a_layer_on_these_kernels_equals_the_reference_s_numbers(path, backend):
    if DEVICE != "cpu":
        pytest.skip("the layers of these tests are on the CPU")
    with use_backend(backend):
        check_golden_layer(path)
