"""Mixed precision."""

import pytest
import torch
from fastai.callback.core import Callback

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.layers.dynamic_group_conv import HeadGates
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.training.callbacks.precision import DeviceMixedPrecision
from helpers import QUICKSTART
from helpers.golden import equal_states
from helpers.runs import ONE_EPOCH, trained


class Weights(Callback):
    """A copy of the weights after each training batch, by its place."""

    order = 90

    def before_fit(self):
        self.after = {}

    def after_batch(self):
        if self.training:
            state = self.model.state_dict().items()
            self.after[self.epoch, self.iter] = {k: v.clone() for k, v in state if "inactive" not in k}


def test_bf16_on_a_cpu_keeps_gates_and_penalty_in_float32():
    kinds = {}

    class Kinds(Callback):
        def before_fit(self):
            for module in self.model.modules():
                if isinstance(module, (HeadGates, torch.nn.Linear)):
                    module.register_forward_hook(lambda m, _, y: kinds.setdefault(type(m).__name__, set()).add(y.dtype))

        def after_loss(self):
            kinds.setdefault("penalty", set()).update(layer.penalty.dtype for layer in dgc_layers(self.model))

    exact, learn = (
        trained(f"train.precision={name}", "train.epochs=3", callbacks=[Kinds()]) for name in ("float32", "bf16")
    )
    assert kinds["HeadGates"] == kinds["penalty"] == {torch.float32} and torch.bfloat16 in kinds["Linear"]
    assert all(weight.dtype is torch.float32 for weight in learn.model.parameters())
    assert learn.recorder.values[-1][1] == pytest.approx(exact.recorder.values[-1][1], abs=0.05)
    assert not torch.is_autocast_enabled("cpu")


def test_an_overflow_in_fp16_leaves_out_a_step_and_halves_the_scale():
    class Overflow(Callback):
        order = DeviceMixedPrecision.order + 1  # what is scaled already

        def before_backward(self):
            if self.iter == 2:
                self.learn.loss_grad = self.learn.loss_grad * torch.inf

    class Scales(Callback):
        order = 95

        def before_fit(self):
            self.seen = []

        def after_batch(self):
            if self.training:
                self.seen.append(self.learn.scaler.get_scale())

    recipe = load_recipe(QUICKSTART, [*ONE_EPOCH, "train.accumulate=1"])
    learn = build_learner(recipe)
    scales, watch = Scales(), Weights()
    learn.add_cbs([DeviceMixedPrecision(amp_mode="fp16", init_scale=1024.0), Overflow(), scales, watch])
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    assert scales.seen == [1024, 1024, 512, 512]

    def weights(batch):
        return {name: watch.after[0, batch][name] for name, _ in learn.model.named_parameters()}

    assert equal_states(weights(1), weights(2)) and not equal_states(weights(2), weights(3))
    assert all(tensor.isfinite().all() for tensor in learn.model.state_dict().values())
