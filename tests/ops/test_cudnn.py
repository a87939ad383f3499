"""The backend "cudnn" against the definition: its passes in Triton's interpreter, or all of it on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dgc_fastai.ops import BACKENDS, use_backend
from dgc_fastai.ops.backends import scaled_weights
from helpers.golden import LAYERS, check_golden_layer
from helpers.triton_layers import DEVICE, NAMES, ONE, Kernels, improve_interpreter, make_case, random_case

pytest.importorskip("triton")

from dgc_fastai.ops.backends import triton_passes

KERNELS = Kernels("cudnn")


@pytest.fixture(autouse=True)
def better_interpreter(monkeypatch):
    if DEVICE == "cpu":
        improve_interpreter(monkeypatch)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_definition_on_random_layers(seed):
    KERNELS.check(*random_case(seed))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        {"filters": 2, "size": (6, 7)},  # products
        {"filters": 2, "size": (6, 7), "stride": (2, 2)},
        {"filters": 40, "size": (3, 3), "heads": 3},  # convolutions with 1x1 filters
        {"kernel": (3, 3), "padding": ONE, "stride": (2, 2), "channels": 33, "heads": 5},
        {"kernel": (2, 3), "dilation": (2, 1), "heads": 1},
        {"keep": 0},
    ],
    ids=str,
)
def test_equals_the_definition_on_special_layers(case, last, norm):
    KERNELS.check(*make_case(last=last, norm=norm, **case))


@pytest.mark.parametrize("kernel", [ONE, (3, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_the_definition(dtype, kernel):
    KERNELS.check(*make_case(kernel=kernel, padding=(kernel[0] // 2,) * 2, dtype=dtype, last=True), tolerance=2e-2)


def test_a_batch_in_parts_equals_the_whole(monkeypatch):
    inputs, geometry = make_case(batch=5, filters=2)
    whole = KERNELS.check(inputs, geometry)
    for name in ("MAX_VALUES", "MAX_VALUES_ON_GPU"):
        monkeypatch.setattr(scaled_weights, name, 2 * inputs[2].numel())
    torch.manual_seed(0)
    for name, ours, theirs in zip(NAMES, KERNELS.check(inputs, geometry), whole):
        assert ours.shape == theirs.shape, name


def test_gradients_of_gates_are_sums_of_exact_products():
    """In bfloat16, to round the products before they are summed costs five digits of the sum."""
    x, part = (torch.randn(1, 8, 32, 32).to(DEVICE, torch.bfloat16) for _ in range(2))
    _, dgates, _, _ = triton_passes.combine(x, None, torch.ones(1, 1, 8, device=DEVICE), [part])
    products = x.double() * part.double()
    torch.testing.assert_close(
        dgates[:, 0].double(), products.sum((2, 3)), rtol=0, atol=1e-6 * float(products.abs().sum((2, 3)).max())
    )


class Largest(TorchDispatchMode):
    """Counts the copies of features of any kind: results of operators as large as y or larger, but for views."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        views = function._schema.returns and any(one.alias_info for one in function._schema.returns)
        if isinstance(result, torch.Tensor) and result.numel() >= self.size and not views:
            self.names.append(function._schema.name.removeprefix("aten::"))
        return result


@pytest.mark.parametrize("last", [False, True])
def test_y_and_its_gradient_are_copied_once(last):
    """Nor does a layout change on the way: what the convolutions get and give is channels-last, or nothing is."""
    inputs, geometry = make_case(kernel=(3, 3), padding=ONE, heads=2, filters=20, channels=5, size=(9, 9), last=last)
    with Largest(2 * 40 * 81) as seen:
        y = KERNELS.forward(*inputs, *geometry)
    assert seen.names.count("stack") + seen.names.count("cat") == 1 and "clone" not in seen.names
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    with Largest(2 * 40 * 81) as seen:
        dx, _, dweight, *_ = KERNELS.backward(torch.randn_like(y), *inputs, *geometry)
    assert seen.names.count("clone") == 1 and "stack" not in seen.names
    assert dx.stride() == inputs[0].stride() and dweight.stride() == inputs[2].stride()


def test_layers_that_it_does_not_support_are_left_to_others():
    inputs, _ = make_case(dtype=torch.float64, norm=False)
    assert not BACKENDS["cudnn"].is_supported(None, inputs[0], inputs[2])
    assert not BACKENDS["cudnn"].is_supported(None, inputs[0][:0].float(), inputs[2])


@pytest.mark.parametrize("path", LAYERS[:3], ids=lambda path: path.stem)
def test_a_layer_equals_the_reference_s_numbers(path):
    if DEVICE != "cpu":
        pytest.skip("the layers of these tests are on the CPU")
    with use_backend("cudnn"):
        check_golden_layer(path)
