"""Layers for the Triton kernels, on a GPU where there is one, in Triton's interpreter elsewhere."""

import dataclasses
import os
import random

import numpy as np
import torch
import torch.nn.functional as F

from dgc_fastai.ops import BACKENDS
from dgc_fastai.ops.backends.base import Norm
from dgc_fastai.ops.conv_desc import conv_desc
from helpers.golden import close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

ONE = (1, 1)
NAMES = ("y", "dx", "dgates", "dweight", "dscale", "dshift")


def improve_interpreter(monkeypatch):
    """With products of bfloat16, and without the checks for overflow, which take half of the time."""
    from triton import language
    from triton.runtime import interpreter

    assert isinstance(language.cdiv, interpreter.InterpretedFunction), (
        "Triton was imported before the interpreter was set"
    )

    def readable(handle):
        """The interpreter keeps bfloat16 as the integers of its bits, and a product would multiply these."""
        if handle.dtype != language.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), language.float32)

    builder = interpreter.interpreter_builder
    create_dot = builder.create_dot
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    monkeypatch.setattr(builder, "create_dot", lambda a, b, *rest: create_dot(readable(a), readable(b), *rest))


class Kernels:
    """A backend by its name, with the arguments of the definition."""

    def __init__(self, name):
        self.backend = BACKENDS[name]

    def forward(self, x, gates, weight, scale, shift, *geometry):
        desc = conv_desc(x.shape, weight.shape, gates.shape[1], *geometry)
        return self.backend.forward(desc, x, gates, weight, None if scale is None else Norm(scale, shift))

    def backward(self, grad, x, gates, weight, scale, shift, *geometry):
        desc = conv_desc(x.shape, weight.shape, gates.shape[1], *geometry)
        norm = None if scale is None else Norm(scale, shift)
        return self.backend.backward(desc, grad, x, gates, weight, norm).summed(weight)

    def results(self, inputs, geometry, reshape=lambda grad: grad):
        """The output's gradient, and the kernels' output and gradients."""
        y = self.forward(*inputs, *geometry)
        grad = reshape(torch.randn_like(y))
        return grad, [y, *self.backward(grad, *inputs, *geometry)]

    def check(self, inputs, geometry, tolerance=1e-5, **keywords):
        """Compare with the definition, and return the results."""
        grad, ours = self.results(inputs, geometry, **keywords)
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


def definition(x, gates, weight, scale, shift, *geometry):
    """[B, O, H', W'] as the docstring of the kernels says it, one head after the other."""
    heads = gates.shape[1]
    u = x if scale is None else F.relu(x * scale[:, None, None] + shift[:, None, None])
    outputs = [F.conv2d(u * gates[:, h, :, None, None], weight[h::heads], None, *geometry) for h in range(heads)]
    return torch.stack(outputs, dim=2).flatten(1, 2)


def expected(grad, inputs, geometry):
    """What `Kernels.results` should give, in float64: a GPU's convolutions may use TF32 for float32."""
    inputs = [tensor.double().requires_grad_() for tensor in inputs if tensor is not None]
    norm = inputs[3:] or (None, None)
    y = definition(*inputs[:3], *norm, *geometry)
    grads = list(torch.autograd.grad(y, inputs, grad.double()))
    grads[1] = grads[1] * (inputs[1] != 0)
    return [y.detach(), *grads, *[None] * (5 - len(inputs))]


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
