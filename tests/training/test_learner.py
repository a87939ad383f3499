"""What a recipe's training keys do: schedules, optimisers, decay, averages, accumulation, mixing."""

import math
import unittest.mock
from functools import partialmethod
from pathlib import Path

import pytest
import timm.optim
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.layers.dynamic_group_conv import HeadGates
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.training.callbacks.ema import AverageWeights
from dgc_fastai.training.callbacks.mixing import MixUpOrCutMix
from dgc_fastai.training.callbacks.precision import DeviceMixedPrecision
from dgc_fastai.training.optimizer import build_optimizer
from dgc_fastai.training.schedules import schedules
from dgc_fastai.utils.errors import RecipeError, TrainingError
from helpers import QUICKSTART
from helpers.datasets import write_imagenet
from helpers.golden import equal_states

TINY = ["model.stages=[1,1,1]", "model.growth=[4,4,4]", "data.batch_size=400", "train.epochs=1"]


def trained(*overrides, callbacks=()):
    recipe = load_recipe(QUICKSTART, [*TINY, *overrides])
    learn = build_learner(recipe)
    learn.add_cbs(list(callbacks))
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    return learn


def rates(*overrides, steps=12, epochs=120):
    recipe = load_recipe(QUICKSTART, [f"train.epochs={epochs}", "train.lr=0.1", *overrides])
    return [schedules(recipe)["lr"](step / steps) for step in range(steps)]


def test_cosine_is_the_authors():
    expected = [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates("train.schedule=cosine") == pytest.approx(expected)


def test_multistep_is_the_authors():
    halves = [0.1] * 6 + [0.01] * 3 + [0.001] * 3
    assert rates("train.schedule=multistep") == pytest.approx(halves)
    for name in ("cifar10", "folder"):
        assert rates("train.schedule=multistep", f"data.name={name}", "data.path=.") == pytest.approx(halves)
    imagenet = "train.schedule=multistep", "data.name=imagenet", "data.path=."
    assert rates(*imagenet) == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3 + [0.0001] * 3)
    assert rates(*imagenet, epochs=60) == pytest.approx([0.1] * 6 + [0.01] * 6)
    # fastai adds the share up, and may come to a step with a little less than its due.
    curve = schedules(load_recipe(QUICKSTART, ["train.epochs=120", "train.lr=0.1", "train.schedule=multistep"]))["lr"]
    assert curve(0.5 - 1e-10) == pytest.approx(0.01) and curve(0.499) == 0.1


def test_flat_cosine_and_one_cycle_are_fastai_s():
    flat = rates("train.schedule=flat_cosine", steps=8)
    assert flat[:7] == pytest.approx([0.1] * 7) and flat[7] == pytest.approx(0.05, abs=1e-5)
    cycle = schedules(load_recipe(QUICKSTART, ["train.lr=0.1"]))
    assert [cycle["lr"](x) for x in (0, 0.25, 1)] == pytest.approx([0.1 / 25, 0.1, 1e-6])
    assert [cycle["mom"](x) for x in (0, 0.25, 1)] == pytest.approx([0.95, 0.85, 0.95])


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "flat_cosine"])
def test_warm_up_is_linear_and_leads_to_the_schedule(schedule):
    chosen = f"train.schedule={schedule}"
    warm, plain = rates(chosen, "train.warmup=30", steps=120), rates(chosen, steps=120)
    assert warm[:30] == pytest.approx([0.001 + 0.099 * step / 30 for step in range(30)])
    assert warm[30] == pytest.approx(0.1)
    if schedule == "cosine":  # over what is left
        assert warm[75] == pytest.approx(0.05)
    else:
        assert warm[30:] == pytest.approx(plain[30:])


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "lion", "adafactor", "rmsproptf", "adan", "lamb", "nadamw"])
def test_timm_s_optimisers_by_name(name):
    learn = trained(f"train.optimizer={name}", "train.momentum=0.8", "train.weight_decay=0.02", "train.schedule=cosine")
    info = timm.optim.get_optimizer_info(name)
    assert type(learn.opt.opt) is info.opt_class
    (group,) = learn.opt.opt.param_groups  # the authors decay every parameter
    assert group["weight_decay"] == 0.02 and len(group["params"]) == len(list(learn.model.parameters()))
    if name == "sgd":
        assert group["momentum"] == 0.8 and group["nesterov"]
    if name in ("adamw", "lion"):
        assert group["betas"] == (0.8, 0.999 if name == "adamw" else 0.99)
    if name == "adan":
        assert group["betas"][0] == 0.98  # three betas, none of which is the usual momentum


@pytest.mark.parametrize(
    "name, message",
    [
        ("adamx", "train.optimizer: timm has no 'adamx'; did you mean 'ada"),
        ("qqqqq", "see timm.optim.list_optimizers"),
        ("adahessian", "needs second derivatives"),
        ("fusedsgd", "train.optimizer: fusedsgd cannot be used here"),
    ],
)
def test_optimisers_that_cannot_be_had(name, message):
    with pytest.raises(RecipeError, match=message):
        build_learner(load_recipe(QUICKSTART, [*TINY, f"train.optimizer={name}"]))


def test_norms_and_biases_can_be_spared_from_decay():
    learn = trained("train.decay_norms=false", "train.weight_decay=0.3")
    decayed, spared = learn.opt.opt.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0)
    assert decayed["lr"] == spared["lr"]
    names = {id(parameter): name for name, parameter in learn.model.named_parameters()}
    spared = {names[id(parameter)] for parameter in spared["params"]}
    assert spared == {name for name in names.values() if ".norm." in f".{name}" or name.endswith("bias")}
    assert any(name.endswith("gates.bias") for name in spared)
    assert len(decayed["params"]) + len(spared) == len(names)


class Watch(Callback):
    """The weights after every step, and those that are validated."""

    order = 90

    def before_fit(self):
        self.steps, self.validated = [], []

    def after_step(self):
        self.steps.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    def before_validate(self):
        self.validated.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})


def test_averaged_weights_are_validated_and_kept():
    watch = Watch()
    learn = trained("train.ema=0.5", "train.epochs=2", callbacks=[watch])
    assert len(watch.steps) == 8
    average = {}
    for step, weights in enumerate(watch.steps):
        # timm's warm-up: the first steps count for more.
        decay = min(0.5, 1 - (1 + step) ** (-2 / 3)) if step else 0
        for name, tensor in weights.items():
            whole = not tensor.is_floating_point()
            average[name] = tensor if whole or not step else decay * average[name] + (1 - decay) * tensor
        if step in (3, 7):
            for name, tensor in watch.validated[step // 4].items():
                torch.testing.assert_close(tensor, average[name], rtol=1e-4, atol=1e-5)
    assert equal_states(learn.model.state_dict(), watch.validated[1])
    assert not equal_states(watch.steps[-1], watch.validated[1])
    assert learn.average_weights.average is None and learn.model.stages[0].layers[0].conv1.inactive_channels > 0


def test_a_cancelled_validation_leaves_the_learner_with_its_own_network():
    learn = build_learner(load_recipe(QUICKSTART, [*TINY, "train.ema=0.9"]))
    own = learn.model

    class Cancel(Callback):
        order = 90

        def after_batch(self):
            if not self.training:
                assert self.learn.model is not own
                from fastai.callback.core import CancelFitException

                raise CancelFitException

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Cancel())
    assert learn.model is own


def test_gradients_are_accumulated_over_batches():
    learn = trained("train.accumulate=2", "train.epochs=2", callbacks=[watch := Watch()])
    assert len(learn.recorder.losses) == 8 and len(watch.steps) == 3  # 1,437 images of 800 a step, twice
    assert learn.whole_batch_accumulation.n_acc == 800


def test_gradients_are_clipped():
    norms = []

    class Norms(Callback):
        order = 15

        def before_step(self):
            norms.append(float(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm()))

    trained("train.clip=0.01", callbacks=[Norms()])
    assert norms == pytest.approx([0.01] * 4, rel=1e-2)


def test_label_smoothing_is_pytorch_s():
    learn = trained("train.label_smoothing=0.1")
    x, y = torch.randn(5, 10), torch.arange(5)
    expected = torch.nn.functional.cross_entropy(x, y, label_smoothing=0.1)
    torch.testing.assert_close(learn.loss_func(x, y), expected)


def test_mixing_is_fastai_s_and_by_a_coin_if_both_are_named():
    assert trained("train.mixup=0.3").mix_up.distrib.concentration0 == 0.3
    assert trained("train.cutmix=0.7").cut_mix.distrib.concentration0 == 0.7
    seen = []

    class Kind(Callback):
        order = 90

        def before_batch(self):
            if self.training:
                lam = self.mix_up_or_cut_mix.lam
                seen.append("mixup" if lam.numel() > 1 else "cutmix")
                # The loss is that of both labels, in the shares of the mixture.
                mixed = self.mix_up_or_cut_mix.lf(pred := torch.randn(len(self.y), 10), self.y)
                both = [
                    torch.nn.functional.cross_entropy(pred, y, reduction="none")
                    for y in (self.y, self.mix_up_or_cut_mix.yb1[0])
                ]
                torch.testing.assert_close(mixed, (lam * both[0] + (1 - lam) * both[1]).mean())

    learn = trained("train.mixup=0.3", "train.cutmix=0.7", "data.batch_size=50", callbacks=[Kind()])
    mixers = learn.mix_up_or_cut_mix.choices
    assert [type(mixer) for mixer in mixers] == [MixUp, CutMix]
    assert [float(mixer.distrib.concentration0) for mixer in mixers] == pytest.approx([0.3, 0.7])
    assert 5 < seen.count("mixup") < 24 and len(seen) == 29
    assert type(learn.loss_func).__name__ == "CrossEntropyLossFlat"  # and is itself again


def test_nothing_is_added_that_is_not_asked_for():
    learn = build_learner(load_recipe(QUICKSTART, TINY))
    kinds = {type(callback) for callback in learn.cbs}
    assert not kinds & {MixUp, CutMix, MixUpOrCutMix, AverageWeights}
    assert not hasattr(learn, "whole_batch_accumulation") and not hasattr(learn, "gradient_clip")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.growth=[4096,4096,4096]", "model.stages=[9,9,9]"], "2,000,000,000 is the most that is tried"),
        (["model.growth=[4,4,4,4,4]", "model.stages=[1,1,1,1,1]"], "cannot take images of"),
    ],
)
def test_a_network_out_of_reach_is_refused_before_memory_is_spent(overrides, message):
    with pytest.raises(RecipeError, match=message):
        build_learner(load_recipe(QUICKSTART, overrides))


@pytest.mark.parametrize("name, is_cuda, fused", [("sgd", True, True), ("adamw", True, True), ("adamw", False, None)])
def test_the_common_optimisers_are_fused_on_a_gpu(monkeypatch, name, is_cuda, fused):
    class Parameter(torch.nn.Parameter):  # there may be no GPU here
        is_cuda = False

    Parameter.is_cuda = is_cuda
    asked = {}

    def create(parameters, *args, **keywords):
        asked.update(keywords)
        return torch.optim.SGD(parameters, lr=0.1)

    monkeypatch.setattr("dgc_fastai.training.optimizer.create_optimizer_v2", create)
    train = load_recipe(QUICKSTART, [*TINY, f"train.optimizer={name}"]).train
    build_optimizer([[Parameter(torch.zeros(2))]], 0.1, train)
    assert asked.get("fused") is fused


def test_channels_last_and_compile_train_the_same_network():
    import torch._dynamo

    torch._dynamo.reset()
    sgd = "train.optimizer=sgd", "train.lr=0.01"  # Adam makes much of a gradient's rounding error
    plain = trained(*sgd)
    last = trained("train.channels_last=true", *sgd)
    weights = [parameter for parameter in last.model.parameters() if parameter.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with unittest.mock.patch("torch.nn.Module.compile", partialmethod(torch.nn.Module.compile, backend="eager")):
        compiled = trained("train.compile=true", *sgd)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for learn in (last, compiled):
        assert learn.model.state_dict().keys() == plain.model.state_dict().keys()
        for name, value in plain.model.state_dict().items():
            torch.testing.assert_close(learn.model.state_dict()[name], value, rtol=1e-2, atol=1e-3)


class NonFinite(Callback):
    """A loss that is no number, from some batches, which leave their traces in the norms."""

    order = 4  # before anybody looks at it

    def __init__(self, batches):
        self.batches = batches

    def after_loss(self):
        if self.training and (self.epoch, self.iter) in self.batches:
            self.learn.loss_grad, self.learn.loss = self.learn.loss_grad * math.nan, self.learn.loss * math.nan
            self.model.stages[0].layers[0].conv1.norm.running_mean.data.fill_(math.nan)


class Weights(Callback):
    """A copy of the weights after each training batch, by its place."""

    order = 90

    def before_fit(self):
        self.after = {}

    def after_batch(self):
        if self.training:
            state = self.model.state_dict().items()
            self.after[self.epoch, self.iter] = {k: v.clone() for k, v in state if "inactive" not in k}


def test_a_loss_that_is_no_number_stops_the_training():
    with pytest.raises(TrainingError) as error:
        trained("train.epochs=2", callbacks=[NonFinite({(1, 2)})])
    text = str(error.value)
    assert "the loss is nan at step 7 (epoch 2, batch 3), of the images" in text and "and 397 more" in text
    assert "use a smaller train.lr" in text


def test_the_images_of_a_bad_batch_are_named(tmp_path):
    write_imagenet(tmp_path, train=3)
    data = "data.name=imagenet", f"data.path={tmp_path}", "data.size=32", "data.batch_size=4", "train.epochs=1"
    recipe = load_recipe(QUICKSTART, [*TINY, *data])
    learn = build_learner(recipe)
    learn.add_cb(NonFinite({(0, 1)}))
    with learn.no_bar(), learn.no_logging(), pytest.raises(TrainingError):
        learn.fit_recipe()
    files = learn.dls.train_ds.items
    expected = [str(files[index]) for index in learn.dls.train.indices[4:8]]
    assert learn.non_finite_loss.images == expected and all(Path(name).is_file() for name in expected)


def test_a_batch_without_a_finite_loss_can_be_left_out(caplog):
    watch = Weights()
    learn = trained("train.epochs=2", "train.nonfinite=skip", "train.ema=0.9", callbacks=[NonFinite({(0, 1)}), watch])
    assert equal_states(watch.after[0, 0], watch.after[0, 1])  # neither weights nor statistics
    assert not equal_states(watch.after[0, 1], watch.after[0, 2])
    assert all(tensor.isfinite().all() for tensor in learn.model.state_dict().values())
    assert all(math.isfinite(number) for row in learn.recorder.values for number in row)
    assert "left out a batch: the loss is nan at step 2" in caplog.text
    with pytest.raises(TrainingError, match="as in the 9 batches before"):
        always = NonFinite({(epoch, batch) for epoch in range(3) for batch in range(4)} - {(0, 0)})
        trained("train.epochs=3", "train.nonfinite=skip", callbacks=[always])


def test_weights_that_are_no_numbers_are_not_kept():
    class Break(Callback):
        def after_batch(self):
            if self.training and self.iter == 3:  # the last one: no loss tells of it any more
                self.model.classifier.weight.data[0, 0] = math.inf

    with pytest.raises(TrainingError, match="the weights are not finite any more at the end of epoch 1"):
        trained(callbacks=[Break()])


def test_bf16_on_a_cpu_keeps_gates_and_lasso_in_float32():
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

        def after_loss(self):
            self.learn.loss_grad = self.learn.loss_grad * (torch.inf if self.training and self.iter == 2 else 1)

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

    recipe = load_recipe(QUICKSTART, [*TINY, "train.accumulate=1"])
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
