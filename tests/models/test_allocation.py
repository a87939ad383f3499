"""How many channels each layer keeps: the budget is met, and what matters is kept."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dgc_fastai import budget, convert
from dgc_fastai.models.allocation import Options, allocate, mac_budget, mac_options, one_gate_factor, reach

SIZE = (3, 64, 64)


def options(name, channels, step, gates=0.0, loss=1.0, bend=2.0):
    """A layer whose channels cost `step` each, and that loses up to `loss`."""
    costs = np.arange(channels + 1) * float(step) + gates
    costs[-1] -= gates
    return Options(name, costs, loss * np.linspace(1, 0, channels + 1) ** bend)


def cost_of(layers, kept):
    return sum(one.costs[kept[one.name]] for one in layers)


some_layers = st.lists(
    st.tuples(
        st.integers(8, 60),
        st.integers(1, 50),
        st.floats(0, 30),
        st.floats(0.01, 100),
        st.floats(0.3, 4),
    ),
    min_size=1,
    max_size=6,
).map(lambda rows: [options(f"l{place}", *row) for place, row in enumerate(rows)])


@settings(deadline=None, max_examples=150)
@given(some_layers, st.floats(0, 1))
def test_the_budget_is_met_to_half_a_step(layers, share):
    least, most = reach(layers)
    wanted = least + share * (most - least)
    kept = allocate(layers, wanted)
    assert all(one.fewest <= kept[one.name] <= one.channels for one in layers)
    # Gates open and close with a layer's first channel, so that next to no cut, steps are larger by them.
    room = [one for one in layers if one.fewest < kept[one.name] < one.most]
    if room:
        assert abs(cost_of(layers, kept) - wanted) <= min(one.step for one in room) / 2 + 1e-6


# In which a layer of larger steps closes too far, so that those of smaller steps open again.
TOO_FAR = [
    (8, 1, 0.0, 0.25, 1.0),
    (8, 5, 0.0, 3.0, 1.0),
    (8, 1, 0.0, 1.0, 1.0),
    (17, 2, 0.0, 1.0, 1.0),
    (22, 3, 3.0, 6.0, 2.0),
]


@settings(deadline=None, max_examples=150)
@given(some_layers, st.floats(0, 1), st.floats(1.01, 50), st.booleans())
@example([options(f"l{place}", *row) for place, row in enumerate(TOO_FAR)], 0.5, 2.0, False)
def test_a_more_sensitive_layer_never_keeps_less(layers, share, more, is_first):
    worse = replace(layers[0], name="worse", losses=layers[0].losses * more)
    layers = [worse, *layers] if is_first else [*layers, worse]
    least, most = reach(layers)
    kept = allocate(layers, least + share * (most - least))
    assert kept["worse"] >= kept["l0"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 10)), min_size=3, max_size=3), st.floats(0, 1))
def test_no_choice_that_is_cheaper_by_a_channel_of_each_layer_loses_less(rows, share):
    layers = [options(f"l{place}", 10, step, 0, loss) for place, (step, loss) in enumerate(rows)]
    least, most = reach(layers)
    wanted = least + share * (most - least)
    kept = allocate(layers, wanted)
    loss = sum(one.losses[kept[one.name]] for one in layers)
    for choice in itertools.product(range(1, 11), repeat=3):
        if sum(one.costs[number] for one, number in zip(layers, choice)) <= wanted - sum(one.step for one in layers):
            assert loss <= sum(one.losses[number] for one, number in zip(layers, choice)) + 1e-9


def test_layers_that_matter_stay_whole_and_others_close():
    vital, idle, plain = (options(name, 64, 10, 20, loss) for name, loss in (("v", 100), ("i", 1e-3), ("p", 1)))
    assert allocate([vital, idle, plain], 0.6 * 1920) == {"v": 64, "i": 8, "p": 39}
    assert allocate([vital, idle, plain], 0)["v"] == 8, "cheaper than all that can be chosen"


def test_a_layer_whose_first_channels_save_nothing_is_left_whole_or_closed_far():
    """Measured times can even grow at first: gates cost more than the first channels save."""
    slow = Options("slow", np.array([2, 3, 4, 5, 6, 7, 8, 9, 8.0]), np.linspace(1, 0, 9))
    useless = Options("useless", np.array([9, 9, 9, 9, 9, 9, 9, 9, 8.0]), np.zeros(9))
    assert allocate([slow, useless], 15.9)["useless"] == 8
    assert all(allocate([slow, useless], wanted)["slow"] in (8, 5, 4, 3, 2, 1) for wanted in np.arange(10, 16, 0.25))


@pytest.mark.parametrize("granularity", [1, 8])
def test_costs_are_those_that_the_budget_of_the_network_counts(granularity):
    network = convert(timm.create_model("resnet10t", num_classes=7), gate_factor=0.5, granularity=granularity)
    cost = budget(network, SIZE)
    layers = mac_options(network, cost)
    wanted = mac_budget(layers, cost, 0.5)
    kept = allocate([replace(one, losses=np.linspace(1, 0, one.channels + 1) ** 2) for one in layers], wanted)
    factors = {one.name: one.gate_factor(kept[one.name]) for one in layers}
    fresh = timm.create_model("resnet10t", num_classes=7)
    chosen = budget(convert(fresh, gate_factor=factors, granularity=granularity), SIZE)
    assert chosen.macs_dense == cost.macs_dense
    steps = [one.step for one in layers if one.fewest < kept[one.name] < one.most]
    assert abs(chosen.macs - 0.5 * cost.macs_dense) <= min(steps) / 2 + 1
    assert chosen.macs == pytest.approx(cost.macs_dense - reach(layers)[1] + cost_of(layers, kept))
    factor = one_gate_factor(layers, wanted)
    fresh = timm.create_model("resnet10t", num_classes=7)
    alike = budget(convert(fresh, gate_factor=factor, granularity=granularity), SIZE)
    assert alike.macs / cost.macs_dense == pytest.approx(0.5, abs=0.005 * granularity)


def test_a_target_below_all_that_can_be_chosen_is_refused():
    network = convert(timm.create_model("resnet10t", num_classes=7).to("meta"))
    cost = budget(network, SIZE)
    with pytest.raises(ValueError, match=r"target=0.01 is out of reach: with 0.125 of .* use a target from 0.14 to 1$"):
        mac_budget(mac_options(network, cost), cost, 0.01)


def test_a_layer_that_is_called_twice_costs_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    network = convert(Twice(), input_size=(16, 8, 8))
    cost = budget(network, (16, 8, 8))
    (layer,) = mac_options(network, cost)
    assert layer.costs[4] == cost.macs and layer.costs[16] == cost.macs_dense
