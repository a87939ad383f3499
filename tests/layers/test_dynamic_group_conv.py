"""The layer against the reference's numbers, and what a user of a PyTorch layer expects of it."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from dgc_fastai import DynamicGroupConv2d, gate_penalty, set_progress
from dgc_fastai.layers.gate_schedule import num_inactive
from dgc_fastai.ops.gates import drop_smallest
from dgc_fastai.ops.selection import use_backend
from helpers.golden import LAYERS, check_golden_layer, close, read_json


@pytest.mark.parametrize("backend", [None, "reference", "scaled_weights", "scaled_inputs", "gathered", "cpu"])
@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.stem)
def test_layer_equals_the_reference_forward_and_backward(path, backend):
    with use_backend(backend):
        check_golden_layer(path)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.stem)
def test_a_memory_efficient_layer_equals_the_reference(path, backend):
    with use_backend(backend):
        check_golden_layer(path, memory_efficient=True)


def test_memory_efficient_keeps_one_copy_of_the_input_and_computes_the_norm_twice():
    def saved(memory_efficient):
        layer = DynamicGroupConv2d(16, 8, 3, padding=1, memory_efficient=memory_efficient)
        sizes = {}

        def pack(tensor):
            if tensor is not None:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(2, 16, 12, 12)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        keep = [y, x]  # so that no address is used twice
        del keep
        return y, sum(size for size in sizes.values() if size >= x.nbytes) / x.nbytes

    assert saved(False)[1] == 2
    y, copies = saved(True)
    assert copies <= 1
    y.sum().backward()


@pytest.mark.parametrize("norm", [dict(momentum=None), dict(track_running_stats=False), dict(affine=False), "frozen"])
def test_memory_efficient_leaves_other_norms_to_pytorch(norm):
    x, results = torch.randn(4, 16, 6, 6), []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        layer = DynamicGroupConv2d(16, 8, 1, memory_efficient=memory_efficient)
        if norm == "frozen":
            layer.norm.eval()
        else:
            layer.norm = torch.nn.BatchNorm2d(16, **norm)
        layer(x).sum().backward()
        results.append((layer.weight.grad, *layer.norm.buffers()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


def test_memory_efficient_keeps_the_hooks_of_a_norm():
    layer, seen = DynamicGroupConv2d(16, 8, 1, memory_efficient=True), []
    layer.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer(torch.randn(2, 16, 4, 4))
    assert seen == [(2, 16, 4, 4)]


@pytest.mark.parametrize("key", read_json("annealing.json"))
def test_annealing_table(key):
    channels, gate_factor = (part.split("=")[1] for part in key.split(","))
    for progress, expected in read_json("annealing.json")[key]:
        assert num_inactive(int(channels), float(gate_factor), progress) == expected
        layer = DynamicGroupConv2d(int(channels), 4, 1, heads=2, gate_factor=float(gate_factor))
        set_progress(layer, progress)
        assert layer.inactive_channels == expected


def test_annealing_between_the_table_s_points():
    # In whole twelve-hundredths and exact fractions; halves are left out, as floats may round them either way.
    for channels, gate_factor in ((16, Fraction(1, 4)), (64, Fraction(9, 20)), (560, Fraction(1, 2)), (1936, 1)):
        for step in range(1201):
            progress = Fraction(step, 1200)
            exact = channels * (1 - gate_factor) * min(max(Fraction(3, 2) * (progress - Fraction(1, 12)), 0), 1)
            if exact % 1 != Fraction(1, 2):
                assert num_inactive(channels, float(gate_factor), float(progress)) == round(exact)


def test_ties_go_with_the_smallest_and_zero_drops_nothing():
    gates = torch.tensor([[0.0, 1.0, 1.0, 2.0, 3.0], [3.0, 2.0, 2.0, 2.0, 0.5]])
    for count, expected in {
        0: gates,
        1: torch.tensor([[0, 1.0, 1, 2, 3], [3, 2, 2, 2, 0]]),
        2: torch.tensor([[0, 0, 0, 2.0, 3], [3, 0, 0, 0, 0]]),
        3: torch.tensor([[0, 0, 0, 2.0, 3], [3, 0, 0, 0, 0]]),
        5: torch.zeros(2, 5),
    }.items():
        assert torch.equal(drop_smallest(gates, torch.tensor(count)), expected.float())


def test_gates_that_are_not_numbers_are_not_hidden():
    gates = torch.tensor([[float("nan"), 1.0, 2.0, 3.0]])
    assert drop_smallest(gates, torch.tensor(2)).isnan().any()


def plain_definition(layer, x):
    """One sample, one head, one channel at a time, straight from the paper's description."""
    x = F.relu(layer.norm(x))
    convolution = layer.stride, layer.padding, layer.dilation
    outputs = []
    for sample in x:
        pooled = sample.mean((1, 2))
        heads = []
        for head in range(layer.heads):
            hidden = F.relu(layer.gates.squeeze[head] @ pooled)
            gate = F.relu(layer.gates.excite[head] @ hidden + layer.gates.bias[head])
            limit = sorted(gate.tolist())[int(layer.inactive_channels) - 1] if layer.inactive_channels else -1
            total = F.conv2d(sample[None], 0 * layer.weight[head :: layer.heads], None, *convolution)
            for channel in range(layer.in_channels):
                if gate[channel] > limit:
                    filters = layer.weight[head :: layer.heads, channel : channel + 1]
                    plane = sample[None, channel : channel + 1] * gate[channel]
                    total = total + F.conv2d(plane, filters, None, *convolution)
            heads.append(total[0])
        outputs.append(torch.stack([heads[o % layer.heads][o // layer.heads] for o in range(layer.out_channels)]))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_size=1),
        dict(kernel_size=3, padding=1, stride=2, heads=3),
        dict(kernel_size=(1, 3), padding=(0, 1), heads=1),
        dict(kernel_size=3, padding=2, dilation=2, heads=6, gate_factor=0.5),
        dict(kernel_size=5, stride=(2, 1), heads=2, gate_factor=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("progress", [0, 0.5, 1])
def test_layer_equals_the_plain_definition(arguments, progress):
    layer = DynamicGroupConv2d(9, 12, **{"heads": 4, "squeeze_rate": 4, **arguments})
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    set_progress(layer, progress)
    x = torch.randn(2, 9, 7, 8)
    with torch.no_grad():
        close(layer.eval()(x), plain_definition(layer, x), 1e-5)


def test_gradient_agrees_with_a_difference_quotient():
    layer = DynamicGroupConv2d(6, 4, 3, padding=1, heads=2, squeeze_rate=2, gate_factor=0.5)
    set_progress(layer, 1)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    # In float32, as the gates are: hence the large step and the loose comparison.
    loss = (layer(x) * torch.linspace(-1, 1, 4).view(4, 1, 1)).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    direction = torch.randn_like(x)
    step = 1e-2
    with torch.no_grad():
        values = [(layer(x + s * step * direction) * torch.linspace(-1, 1, 4).view(4, 1, 1)).sum() for s in (1, -1)]
    assert torch.isclose((gradient * direction).sum(), (values[0] - values[1]) / (2 * step), rtol=2e-2)


@pytest.mark.parametrize("progress", [0, 0.3, 0.75, 1])
def test_every_parameter_has_a_gradient_at_every_progress(progress):
    layer = DynamicGroupConv2d(16, 8, 3, padding=1)
    set_progress(layer, progress)
    (layer(torch.randn(4, 16, 5, 5)).square().mean() + gate_penalty(layer)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initialisation_is_the_reference_s():
    layer = DynamicGroupConv2d(256, 512, 3, heads=4, squeeze_rate=16)
    assert abs(layer.weight.std() / (2 / (9 * 128)) ** 0.5 - 1) < 0.01
    assert abs(layer.gates.squeeze.std() / (2 / 256) ** 0.5 - 1) < 0.02
    assert abs(layer.gates.excite.std() / (2 / 16) ** 0.5 - 1) < 0.02
    assert (layer.gates.bias == 1).all()
    assert layer.inactive_channels == 0


def test_progress_is_the_layer_s_own_and_travels_with_its_state():
    first, second = (DynamicGroupConv2d(16, 8, 1) for _ in range(2))
    set_progress(first, 1)
    assert (first.inactive_channels, second.inactive_channels) == (12, 0)
    second.load_state_dict(first.state_dict())
    assert second.inactive_channels == 12
    assert first.half().inactive_channels.dtype == torch.int64


def test_forward_reads_no_number_back_from_the_device():
    # The meta device has no numbers to read: `.item()` or `int(buffer)` would raise there.
    layer = DynamicGroupConv2d(16, 8, 3, padding=1).to("meta")
    assert layer(torch.empty(2, 16, 5, 5, device="meta")).shape == (2, 8, 5, 5)


def test_gates_stay_in_float32_under_autocast_and_in_half_precision_weights():
    layer = DynamicGroupConv2d(16, 8, 1)
    set_progress(layer, 1)
    x = torch.randn(4, 16, 6, 6)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert (y.dtype, layer.penalty.dtype) == (torch.bfloat16, torch.float32)
    close(y.float(), expected, 2e-2)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.penalty.dtype == torch.float32


def test_copies_and_pickles_after_a_training_step():
    layer = DynamicGroupConv2d(16, 8, 1)
    layer(torch.randn(2, 16, 4, 4))
    x = torch.randn(2, 16, 4, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.eval()(x), layer.eval()(x))
    assert gate_penalty(layer).requires_grad


def test_penalty_without_a_training_forward_is_refused():
    layer = DynamicGroupConv2d(16, 8, 1)
    layer.eval()(torch.randn(2, 16, 4, 4))
    with pytest.raises(RuntimeError, match="training mode"):
        gate_penalty(layer)
    assert gate_penalty(torch.nn.Linear(2, 2)) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(heads=3), "heads=3 does not divide the 32"),
        (dict(heads=0), "heads=0"),
        (dict(gate_factor=0.0), "gate_factor=0.0"),
        (dict(gate_factor=1.5), "gate_factor=1.5"),
        (dict(squeeze_rate=64), "squeeze_rate=64"),
        (dict(squeeze_rate=1), "squeeze_rate=1"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicGroupConv2d(16, 32, 1, **arguments)
    with pytest.raises(ValueError, match="progress"):
        set_progress(DynamicGroupConv2d(16, 32, 1), 1.01)
