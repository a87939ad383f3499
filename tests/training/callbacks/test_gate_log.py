"""What is logged of the gates: of which images, of which network, and at what cost to the training."""

import numpy as np
import pytest
import torch

from dgc_fastai import build_learner, gate_statistics, load_recipe
from dgc_fastai.training.callbacks.gate_log import GateLog, log_numbers, log_picture
from helpers import QUICKSTART
from helpers.golden import equal_states
from helpers.runs import ONE_EPOCH, trained
from helpers.selecting import Selecting, images_of_classes


def test_it_looks_at_images_from_all_batches(monkeypatch):
    monkeypatch.setattr("dgc_fastai.training.callbacks.gate_log.MOST_IMAGES", 20)
    seen = []

    def look(network, batches):
        seen.extend(batches)
        return gate_statistics(network, seen)

    monkeypatch.setattr("dgc_fastai.training.callbacks.gate_log.gate_statistics", look)
    learn = build_learner(load_recipe(QUICKSTART, [*ONE_EPOCH, "data.batch_size=50"]))
    learn.add_cb(GateLog())
    with learn.no_bar(), learn.no_logging():
        learn.validate()
    assert sum(len(images) for images, _ in seen) == 20 and not learn.gate_log.images
    whole = torch.cat([batch[0] for batch in learn.dls.valid])
    places = [int((whole == one).flatten(1).all(1).nonzero()[0, 0]) for images, _ in seen for one in images]
    assert len({place // 50 for place in places}) == 8, "some of each of eight batches"
    assert learn.gate_log.numbers["gates/kept_share"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("more", [[], ["train.ema=0.9"]], ids=["plain", "averaged weights"])
def test_training_does_not_notice(more):
    log = GateLog()
    watched, plain = trained(*more, callbacks=[log]), trained(*more)
    assert equal_states(watched.model.state_dict(), plain.model.state_dict())
    assert watched.recorder.values == plain.recorder.values
    assert "gates/class_information" in log.numbers
    # What was looked at is what was validated: with averaged weights, the average.
    batches = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x, y in plain.dls.valid]
    images, labels = (torch.cat(parts)[:256] for parts in zip(*batches))
    assert log_numbers(gate_statistics(plain.model, [(images, labels)])) == pytest.approx(log.numbers, abs=1e-4)


def test_numbers_and_picture():
    images, labels = images_of_classes()
    statistics = gate_statistics(Selecting(True), [(images, labels)])
    numbers = log_numbers(statistics)
    assert numbers["gates/usage_entropy"] == numbers["gates_by_layer/usage_entropy/layer"] > 0.9
    picture = log_picture(statistics)
    assert picture.shape == (4 * 50, 16 * 50, 3) and picture.dtype == np.uint8
    assert "gates/class_share" not in log_numbers(gate_statistics(Selecting(True), [images]))


def test_what_cannot_be_looked_at_does_not_stop_a_run(monkeypatch, caplog):
    def fail(network, batches):
        raise ValueError("layer did not run")

    monkeypatch.setattr("dgc_fastai.training.callbacks.gate_log.gate_statistics", fail)
    log = GateLog()
    trained(callbacks=[log])
    assert not log.numbers and "the gates are not logged: layer did not run" in caplog.text
