"""Callbacks own their state, and none is lost without an error."""

import io

import pytest
import torch
from fastai.callback.core import Callback

from dgc_fastai.training.callbacks.accumulation import WholeBatchAccumulation
from dgc_fastai.training.callbacks.gates import AnnealGates
from dgc_fastai.training.callbacks.nonfinite import NonFiniteLoss
from dgc_fastai.training.callbacks.precision import DeviceMixedPrecision
from dgc_fastai.training.callbacks.stateful import stateful_callbacks
from dgc_fastai.training.state_file import read_state
from dgc_fastai.utils.errors import CheckpointError
from helpers.command_line import only
from helpers.runs import StopAt, start, trained


class Counter(Callback):
    """A user's callback with a state, and a key of its own."""

    state_key = "steps"

    def __init__(self):
        self.steps = 0

    def after_step(self):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Renamed(Counter):
    """Another class that reads the same state."""


class Stopping(Counter):
    order = StopAt.order

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 1):
            self.save_state.stop = 15


def test_a_callback_of_a_user_is_saved_and_resumed_by_its_key(tmp_path):
    output = f"output={tmp_path}"
    assert start([output], callback=Stopping())[0] is None
    assert read_state(only(tmp_path) / "state.pt")["callbacks"]["steps"] == {"steps": 7}
    counter = Renamed()
    start([output], resume=True, callback=counter)
    assert counter.steps == 15


def test_a_state_without_its_callback_and_a_callback_without_its_state_are_errors(tmp_path):
    output = f"output={tmp_path}"
    start([output], callback=Stopping())
    with pytest.raises(
        CheckpointError, match="it does not fit this run: steps in the file is no callback of the run; "
    ):
        start([output], resume=True)
    (path,) = tmp_path.glob("*/state.pt")
    path.unlink()
    start([output], callback=StopAt(0, 1))
    with pytest.raises(CheckpointError, match="it does not fit this run: the callback steps is not in the file; "):
        start([output], resume=True, callback=Counter())


def test_a_run_saves_what_its_callbacks_own(tmp_path):
    more = "train.ema=0.9", "train.accumulate=3", "train.precision=bf16"
    start([*more, f"output={tmp_path}"], callback=StopAt(0, 1))
    states = read_state(only(tmp_path) / "state.pt")["callbacks"]
    assert states.keys() == {
        "anneal_gates", "average_weights", "diagnosis", "gradient_accumulation", "loss_scaler", "non_finite_loss",
        "run",
    }  # fmt: skip
    assert states["anneal_gates"]["steps"] == 2 and states["anneal_gates"]["penalty_sum"] > 0
    assert states["gradient_accumulation"]["count"] == 600 and states["run"]["rows"] == []
    assert any(gradient is not None and gradient.any() for gradient in states["gradient_accumulation"]["gradients"])


@pytest.mark.parametrize(
    "make, changes",
    [
        (AnnealGates, {"steps": 3, "penalty_sum": torch.tensor(1.5)}),
        (NonFiniteLoss, {"in_a_row": 4}),
    ],
    ids=["anneal_gates", "non_finite_loss"],
)
def test_states_go_through_a_file(make, changes):
    first, second = make(), make()
    vars(first).update(changes)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert {name: getattr(second, name) for name in changes} == changes


def test_the_loss_scaler_is_part_of_the_state():
    learn = trained()
    states = []
    for scale in (2048.0, 1024.0):
        callback = DeviceMixedPrecision(amp_mode="fp16", init_scale=scale)
        callback.learn = learn
        callback.before_fit()
        if states:
            callback.load_state_dict(states[0])
        states.append(callback.state_dict())
    assert states[0] == states[1] and states[0]["scale"] == 2048


def test_gradients_of_another_network_are_refused():
    callback = WholeBatchAccumulation(8)
    callback.network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="zip"):
        callback.load_state_dict({"count": 1, "gradients": [None]})


def test_two_callbacks_of_one_key_are_refused():
    with pytest.raises(ValueError, match="two callbacks save their state as 'steps'"):
        stateful_callbacks([Counter(), Renamed()])


def test_what_the_network_can_do_does_not_make_a_callback_stateful():
    learn = trained()
    callback = Callback()
    callback.learn = learn
    assert callable(callback.state_dict)  # that of the network
    assert stateful_callbacks([callback]) == {}
