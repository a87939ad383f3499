"""Layers in which blocks of neighboring channels share a gate."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from dgc_fastai import DynamicGroupConv2d, gate_penalty, set_progress
from dgc_fastai.layers.dynamic_group_conv import fitting_granularity
from dgc_fastai.layers.gate_schedule import num_inactive
from dgc_fastai.ops import use_backend
from helpers.golden import close


def make_layer(granularity=8, progress=1.0, channels=80, **keywords):
    torch.manual_seed(0)
    layer = DynamicGroupConv2d(channels, 12, 3, padding=1, **{"granularity": granularity, "heads": 3, **keywords})
    set_progress(layer, progress)
    return layer


def observed(layer, x):
    """The output, and the kept gates [B, heads, C]."""
    seen = []
    layer.gate_observer = seen.append
    y = layer(x)
    del layer.gate_observer
    return y, seen[0]


def plain_definition(layer, x):
    """Output, gates of the channels and penalty, one block at a time, from the paper's description."""
    x, size = F.relu(layer.norm(x)), layer.granularity
    outputs, kept, penalty = [], [], 0
    dropped = int(layer.inactive_channels) // size
    for sample in x:
        pooled, heads = sample.mean((1, 2)), []
        for head in range(layer.heads):
            hidden = F.relu(layer.gates.squeeze[head] @ pooled)
            gates = F.relu(layer.gates.excite[head] @ hidden + layer.gates.bias[head])
            penalty = penalty + gates.mean() / len(x)
            gates = torch.where(gates > gates.sort().values[dropped - 1], gates, 0) if dropped else gates
            of_channels = torch.stack([gates[channel // size] for channel in range(layer.in_channels)])
            kept.append(of_channels)
            filters = layer.weight[head :: layer.heads]
            heads.append(F.conv2d((sample * of_channels[:, None, None])[None], filters, None, 1, 1)[0])
        outputs.append(torch.stack(heads, 1).flatten(0, 1))
    return torch.stack(outputs), torch.stack(kept).view(len(x), layer.heads, -1), penalty


@pytest.mark.parametrize("backend", [None, "reference", "scaled_weights", "scaled_inputs", "gathered", "cpu"])
@pytest.mark.parametrize("granularity", [1, 8, 16])
@pytest.mark.parametrize("progress", [0, 0.4, 1])
def test_equals_the_plain_definition_with_its_gradients(backend, granularity, progress):
    layer, x = make_layer(granularity, progress), torch.randn(3, 80, 6, 5, requires_grad=True)
    leaves = [x, *layer.parameters()]
    found = []
    for compute in (lambda: (*observed(layer, x), gate_penalty(layer)), lambda: plain_definition(layer, x)):
        with use_backend(backend):
            y, gates, penalty = compute()
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            gradients = torch.autograd.grad((y * upstream).sum() + penalty, leaves)
        found.append((y, gates, penalty, *gradients))
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, 2e-5)


@pytest.mark.parametrize("granularity", [2, 5, 8, 16, 40, 80])
def test_channels_come_and_go_in_whole_blocks(granularity):
    layer, x = make_layer(granularity), torch.randn(6, 80, 4, 4)
    layer.gates.bias.data += 10  # no gate is zero by itself
    blocks = 80 // granularity
    assert layer.gates.excite.shape[:2] == layer.gates.bias.shape == (3, blocks)
    assert layer.gates.squeeze.shape[2] == 80
    for progress in (0, 0.2, 0.5, 0.7, 1):
        set_progress(layer, progress)
        inactive = int(layer.inactive_channels)
        assert inactive == granularity * min(num_inactive(blocks, 0.25, progress), blocks - 1)
        _, gates = observed(layer.eval(), x)
        by_block = gates.unflatten(2, (blocks, granularity))
        assert (by_block == by_block[..., :1]).all()
        assert ((gates != 0).sum(2) == 80 - inactive).all()


def test_one_block_is_kept_where_rounding_would_drop_all():
    assert [num_inactive(size, 0.25, 1, 8) for size in (8, 16, 24, 32)] == [0, 8, 16, 24]
    layer = make_layer(channels=16)
    layer.gates.bias.data += 10
    assert (observed(layer, torch.randn(2, 16, 4, 4))[1] != 0).sum(2).eq(8).all()


@pytest.mark.parametrize("progress", [0, 0.4, 1])
def test_equals_a_layer_of_single_channels_whose_gates_are_constant_in_blocks(progress):
    layer, single = make_layer(8, progress), make_layer(1)
    state = layer.state_dict()
    for name in ("gates.excite", "gates.bias"):
        state[name] = state[name].repeat_interleave(8, 1)
    single.load_state_dict(state)
    x = torch.randn(4, 80, 6, 5)
    for one in (layer, single):
        (one(x).square().sum() + gate_penalty(one)).backward()
    close(layer(x), single(x), 1e-6)
    close(gate_penalty(layer), gate_penalty(single), 1e-6)
    of_channels = {name: parameter.grad for name, parameter in single.named_parameters()}
    for name, parameter in layer.named_parameters():
        expected = of_channels[name]
        if name in ("gates.excite", "gates.bias"):
            expected = expected.unflatten(1, (10, 8)).sum(2)
        close(parameter.grad, expected, 1e-5)


def test_granularity_one_is_the_layer_without_it():
    torch.manual_seed(0)
    without = DynamicGroupConv2d(80, 12, 3, padding=1, heads=3)
    set_progress(without, 1)
    layer, x = make_layer(1), torch.randn(2, 80, 5, 5)
    for ours, theirs in zip(layer.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(layer(x), without(x))


def test_open_gates_keep_the_convolution_and_drop_the_blocks_of_the_smallest_filters():
    layer, x = make_layer(8, 0, preact=False, zero_init_gates=True), torch.randn(2, 80, 5, 5)
    dense = F.conv2d(
        x, layer.weight * layer.gates.bias.repeat_interleave(8, 1).repeat(4, 1)[:, :, None, None], None, 1, 1
    )
    close(layer(x), dense, 1e-5)
    assert ((layer.gates.bias - 1).abs() < 1e-5).all()
    set_progress(layer, 1)
    kept = observed(layer, x)[1][0].unflatten(1, (10, 8))[..., 0] != 0
    norms = layer.weight.detach().unflatten(0, (-1, 3)).square().sum((0, 3, 4)).unflatten(1, (10, 8)).sum(2)
    for head in range(3):
        assert set(norms[head].topk(2).indices.tolist()) == set(kept[head].nonzero().flatten().tolist())


def test_scripted_compiled_and_without_numbers():
    layer, x = make_layer().eval(), torch.randn(2, 80, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        close(torch.jit.script(layer)(x), expected, 1e-6)
        close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected, 1e-6)
    assert make_layer().to("meta")(torch.empty(2, 80, 5, 5, device="meta")).shape == (2, 12, 5, 5)


def test_copies_and_layers_pickled_before_there_were_blocks():
    layer, x = make_layer(), torch.randn(2, 80, 5, 5)
    assert "granularity=8" in repr(layer) and "granularity" not in repr(make_layer(1))
    assert torch.equal(pickle.loads(pickle.dumps(layer)).eval()(x), layer.eval()(x))
    old = make_layer(1).eval()
    expected = old(x)
    del old.__dict__["granularity"]
    assert torch.equal(pickle.loads(pickle.dumps(old))(x), expected)


@pytest.mark.parametrize("granularity", [0, -8, 3, 32, 160])
def test_granularity_that_does_not_divide_is_refused(granularity):
    with pytest.raises(ValueError, match=f"granularity={granularity} does not divide the 80 input channels"):
        DynamicGroupConv2d(80, 12, 1, granularity=granularity)


def test_what_networks_make_of_it():
    fits = {(24, 16): 8, (24, 8): 8, (24, 1): 1, (64, 32): 32, (64, 128): 64, (7, 8): 1, (144, 32): 16}
    assert {key: fitting_granularity(*key) for key in fits} == fits
    for granularity in (0, 3, 12, -1):
        with pytest.raises(ValueError, match="not a power of two"):
            fitting_granularity(64, granularity)
