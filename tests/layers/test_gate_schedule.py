"""The counts of inactive channels, and when they are written."""

import copy

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from dgc_fastai import DynamicGroupConv2d, set_progress
from dgc_fastai.layers.gate_schedule import dgc_layers


class Fills(TorchDispatchMode):
    """Counts what is written, and refuses to read it back."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        self.count += function is torch.ops.aten.fill_.Scalar
        return function(*args, **kwargs or {})


def fills(model, progress):
    with Fills() as mode:
        set_progress(model, progress)
    return mode.count


def counts(model):
    return [int(layer.inactive_channels) for layer in dgc_layers(model)]


def two_layers():
    return nn.Sequential(DynamicGroupConv2d(16, 16, 1), DynamicGroupConv2d(32, 16, 1))


def test_counts_are_written_when_they_change():
    model = two_layers()
    fills(model, 0)
    assert fills(model, 0.05) == 0 and counts(model) == [0, 0]
    assert fills(model, 0.12) == 2 and counts(model) == [1, 1]
    assert fills(model, 0.1334) == 1 and counts(model) == [1, 2]
    assert fills(model, 0.1334) == 0


def test_whatever_else_writes_a_count_is_noticed():
    model, other = two_layers(), two_layers()
    set_progress(other, 0.4)
    set_progress(model, 1)

    def load(model):
        model.load_state_dict(other.state_dict())

    def assign(model):
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)

    def write(model):
        model[0].inactive_channels.fill_(3)

    def move(model):
        model.to("meta").to_empty(device="cpu")
        for layer in model:
            layer.inactive_channels.zero_()

    for change in (load, assign, write, move):
        change(model)
        assert counts(model) != [12, 24]
        set_progress(model, 1)
        assert counts(model) == [12, 24], change.__name__


def test_a_copy_has_counts_of_its_own():
    model = two_layers()
    set_progress(model, 1)
    other = copy.deepcopy(model)
    set_progress(other, 0)
    set_progress(model, 1)
    assert (counts(model), counts(other)) == ([12, 24], [0, 0])
    set_progress(other, 1)
    assert counts(other) == [12, 24]


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = two_layers()
        for progress, expected in ((1, [12, 24]), (0, [0, 0]), (1, [12, 24])):
            set_progress(model, progress)
            assert counts(model) == expected
