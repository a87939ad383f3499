"""What the Triton kernels that skip dropped channels do, and leave out."""

import pytest

from helpers.triton_layers import DEVICE, Kernels, improve_interpreter, make_case

pytest.importorskip("triton")

from triton.runtime import interpreter

from dgc_fastai.ops.backends import triton_skipping


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter does")
@pytest.mark.parametrize("kept, expected", [(64, 12), (32, 6), (16, 3), (1, 3), (0, 0)])
def test_work_is_in_proportion_to_the_channels_kept(monkeypatch, kept, expected):
    improve_interpreter(monkeypatch)
    builder, products = interpreter.interpreter_builder, []
    create_dot = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *args: (products.append(1), create_dot(*args))[1])
    monkeypatch.setattr(triton_skipping, "_block", lambda size, most: 16)
    inputs, geometry = make_case(batch=1, heads=1, channels=64, size=(4, 4), keep=1)
    inputs[1][:, :, kept:] = 0
    Kernels("triton_skipping").results(inputs, geometry)
    assert len(products) == expected
