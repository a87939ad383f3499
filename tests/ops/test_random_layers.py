"""The operator, and packed layers, on what hypothesis makes up: a failure comes as the smallest layer that fails."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dgc_fastai.ops import BACKENDS
from dgc_fastai.ops.conv_desc import conv_desc
from dgc_fastai.ops.packed_layer import GateWeights, PackedLayer, pack_weight
from helpers.operators import needs_compiler, run

OWN = [name for name, backend in BACKENDS.items() if not backend.uses_triton]  # Triton has tests of its own
KEPT = ["some", "all", "one", "none", "equal"]


@st.composite
def layers(draw, dtypes=(torch.float32, torch.float64)):
    """Input, gates, weight, scale and shift of the normalization or None, and (stride, padding, dilation)."""

    def pair(*sizes):
        return draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))

    batch, heads, channels = draw(st.integers(0, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    taps, geometry = pair(1, 2, 3), (pair(1, 2, 3), pair(0, 1, 2), pair(1, 2))
    height, width, filters = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    shapes = (batch, channels, height, width), (heads * filters, channels, *taps)
    if min(conv_desc(*shapes, heads, *geometry).out_size) < 1:  # too small for the filter
        geometry = geometry[0], (2, 2), (1, 1)
    dtype, generator = draw(st.sampled_from(dtypes)), torch.Generator().manual_seed(draw(st.integers(0, 9)))
    x, weight = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    gates = _gates(draw(st.sampled_from(KEPT)), (batch, heads, channels), generator).to(dtype)
    norm = None, None
    if draw(st.booleans()):
        norm = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    tensors = x, gates, weight, *(part if part is None else part.to(dtype) for part in norm)
    return [part if part is None else part.requires_grad_() for part in tensors], geometry


def _gates(kept, shape, generator):
    gates = torch.rand(shape, generator=generator) + 0.1
    if kept == "some":
        return gates * (torch.rand(shape, generator=generator) < 0.5)
    if kept == "one":
        return gates * F.one_hot(torch.randint(shape[2], shape[:2], generator=generator), shape[2])
    if kept == "none":
        return torch.zeros(shape)
    return torch.full(shape, 0.7) if kept == "equal" else gates


def definition(x, gates, weight, scale, shift, stride, padding, dilation):
    """One convolution per head; a dropped channel is not in it, output channel j * H + h is filter j of head h."""
    if scale is not None:
        x = F.relu(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
    heads = gates.shape[1]
    outputs = []
    for head in range(heads):
        gate = gates[:, head, :, None, None]
        outputs.append(
            F.conv2d(torch.where(gate == 0, 0, x * gate), weight[head::heads], None, stride, padding, dilation)
        )
    return torch.stack(outputs, 2).flatten(1, 2)


@pytest.mark.parametrize("backend", [*OWN, None])
@given(layer=layers())
@settings(max_examples=40)
def test_every_backend_computes_the_definition_and_its_gradients(backend, layer):
    tensors, geometry = layer
    expected = definition(*tensors, *geometry)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    inputs = [part for part in tensors if part is not None]
    gradients = torch.autograd.grad((expected * upstream).sum(), inputs)
    for ours, theirs in zip(run(backend, tensors, geometry), (expected, *gradients), strict=True):
        assert ours.shape == theirs.shape
        limit = 1e-5 if theirs.dtype == torch.float32 else 1e-11
        scale = max(float(theirs.detach().abs().max()), 1) if theirs.numel() else 1
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit * scale)


@st.composite
def packed_layers(draw):
    heads, filters, channels = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 20))
    taps = draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    gates = None
    if draw(st.booleans()):
        hidden, inactive = draw(st.integers(1, 4)), torch.tensor(draw(st.integers(0, channels)))
        gates = GateWeights(
            numbers(heads, hidden, channels), numbers(heads, channels, hidden), numbers(heads, channels), inactive
        )
    bias = numbers(heads * filters) if draw(st.booleans()) else None
    scale, shift = (numbers(channels), numbers(channels)) if gates and draw(st.booleans()) else (None, None)
    pairs = [draw(st.tuples(st.integers(low, 3), st.integers(low, 3))) for low in (1, 0, 1)]
    weight = numbers(heads * filters, channels, *taps)
    return PackedLayer(weight, bias, heads, *pairs, draw(st.booleans()), scale, shift, gates)


@needs_compiler
@given(layer=packed_layers())
@settings(max_examples=60)
def test_packing_keeps_every_value_and_layers_survive_being_flat_or_pickled(layer):
    packed = pack_weight(layer.weight, layer.heads, layer.grouped)
    assert torch.equal(packed.flatten().sort().values, layer.weight.flatten().to(packed.dtype).sort().values)
    for other in (PackedLayer.from_flat(*layer.flat), pickle.loads(pickle.dumps(layer))):
        assert other.is_packed and len(other.flat) == len(layer.flat)
        for ours, theirs in zip(other.flat, layer.flat):
            assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
