"""Losses and weights that are NaN or Inf."""

import math
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.utils.errors import TrainingError
from helpers import QUICKSTART
from helpers.datasets import write_imagenet
from helpers.golden import equal_states
from helpers.runs import ONE_EPOCH, trained


class NonFinite(Callback):
    """Makes the loss of some batches NaN, and the statistics of a normalization layer."""

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


def test_a_nan_loss_stops_the_training():
    with pytest.raises(TrainingError) as error:
        trained("train.epochs=2", callbacks=[NonFinite({(1, 2)})])
    text = str(error.value)
    assert "the loss is nan at step 7 (epoch 2, batch 3), of the images" in text and "and 397 more" in text
    assert "use a smaller train.lr" in text


class Teacher(Callback):
    """As one whose answers to a batch are NaN or Inf: the loss itself is finite."""

    order = 4

    def __init__(self, value):
        self.value = value

    def after_loss(self):
        if self.training and (self.epoch, self.iter) == (0, 1):
            self.learn.loss_grad = self.learn.loss_grad + self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_only_a_teacher_brings_is_seen_in_its_own_batch(value):
    with pytest.raises(TrainingError, match=r"the loss is nan at step 2 \(epoch 1, batch 2\), of the images"):
        trained("train.epochs=1", callbacks=[Teacher(value)])
    watch = Weights()
    trained("train.epochs=1", "train.nonfinite=skip", callbacks=[Teacher(value), watch])
    assert equal_states(watch.after[0, 0], watch.after[0, 1])
    assert all(one.isfinite().all() for one in watch.after[0, 3].values())


def test_the_images_of_a_bad_batch_are_named(tmp_path):
    write_imagenet(tmp_path, train=3)
    data = "data.name=imagenet", f"data.path={tmp_path}", "data.size=32", "data.batch_size=4", "train.epochs=1"
    recipe = load_recipe(QUICKSTART, [*ONE_EPOCH, *data])
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
    assert "skipped a batch: the loss is nan at step 2" in caplog.text
    with pytest.raises(TrainingError, match="as in the 9 batches before"):
        always = NonFinite({(epoch, batch) for epoch in range(3) for batch in range(4)} - {(0, 0)})
        trained("train.epochs=3", "train.nonfinite=skip", callbacks=[always])


def test_buffers_are_kept_in_memory_that_is_allocated_once(monkeypatch):
    calls, copy = [], torch._foreach_copy_

    def counted(to, source, *rest):
        calls.append([one.data_ptr() for one in to])
        assert len({one.dtype for one in to}) == 1  # otherwise PyTorch copies one by one
        return copy(to, source, *rest)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    trained("train.nonfinite=skip")
    steps, types = 4, 2
    assert len(calls) == steps * types and len({tuple(pointers) for pointers in calls}) == types
    calls.clear()
    trained()
    assert not calls


def test_weights_that_are_inf_are_not_kept():
    class Break(Callback):
        def after_batch(self):
            if self.training and self.iter == 3:  # the last one: no loss tells of it any more
                self.model.classifier.weight.data[0, 0] = math.inf

    with pytest.raises(TrainingError, match="the weights are NaN or Inf at the end of epoch 1"):
        trained(callbacks=[Break()])
