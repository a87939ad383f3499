"""What a fastai user does with a network, done with ours."""

import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.vision.all import (
    GradientAccumulation,
    ImageDataLoaders,
    Interpretation,
    MixUp,
    Normalize,
    Resize,
    accuracy,
    load_learner,
    vision_learner,
)

from dgc_fastai import AnnealGates, convert, dgc_learner, load_checkpoint, save_checkpoint, set_progress
from dgc_fastai.layers.gate_schedule import dgc_layers
from helpers.datasets import write_imagenet
from helpers.golden import equal_states

TINY = dict(stages=(1, 1, 1), growth=(4, 8, 8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_imagenet(folder, classes=("cat", "dog"), train=12, valid=4)
    return folder


@pytest.fixture
def dls(pictures):
    return ImageDataLoaders.from_folder(pictures, train="train", valid="val", item_tfms=Resize(32), bs=8, num_workers=0)


class Watch(Callback):
    """The share of channels that each training step finds dropped."""

    order = AnnealGates.order + 1

    def __init__(self):
        self.inactive = []

    def before_batch(self):
        if self.training:
            self.inactive.append(inactive(self))


def inactive(learn):
    layers = dgc_layers(learn.model)
    return sum(int(layer.inactive_channels) for layer in layers) / sum(layer.in_channels for layer in layers)


@pytest.mark.parametrize("arch", ["dgc_resnet18", "dgc_densenet22", "dgc_mobilenetv2_100"])
def test_vision_learner(dls, arch):
    learn = vision_learner(dls, arch, pretrained=False, metrics=accuracy, cbs=AnnealGates())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()
    assert inactive(learn) == pytest.approx(0.55 if "resnet" in arch else 0.75, abs=0.01)


def test_fine_tune_closes_the_gates_once_they_can_learn(dls):
    watch = Watch()
    learn = dgc_learner(dls, "dgc_densenet22", metrics=accuracy, cbs=watch, **TINY)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(3, 1e-3, freeze_epochs=2)
    frozen, rest = watch.inactive[:6], watch.inactive[6:]
    assert frozen == [0] * 6 and rest == sorted(rest) and rest[0] == 0 and rest[-1] == pytest.approx(0.75, abs=0.05)


def test_gates_that_have_closed_can_stay_closed(dls):
    watch = Watch()
    model = timm.create_model("dgc_densenet22", num_classes=2, **TINY)
    set_progress(model, 1)
    learn = dgc_learner(dls, model, anneal=False, cbs=watch)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-3)
    assert set(watch.inactive) == {0.75}
    assert learn.recorder.metric_names[-4:] == ["inactive", "gate_penalty", "lr", "time"]


def test_dgc_learner_builds_the_paper_s_network(dls, tmp_path):
    learn = dgc_learner(dls, "dgc_densenet22", gate_factor=0.5, lasso_weight=1e-3, metrics=accuracy, wd=0.1, **TINY)
    assert isinstance(learn.model.get_classifier(), torch.nn.Linear)
    assert learn.model.get_classifier().out_features == 2
    assert {layer.gate_factor for layer in dgc_layers(learn.model)} == {0.5}
    assert learn.anneal_gates.lasso_weight == 1e-3 and learn.wd == 0.1
    (norm,) = dls.after_batch.fs.filter(lambda f: isinstance(f, Normalize))
    assert norm.mean.flatten().tolist() == pytest.approx([0.4914, 0.4824, 0.4467])
    body, head = learn.splitter(learn.model)
    assert {id(p) for p in head} == {id(p) for p in learn.model.classifier.parameters()}
    assert len(body) + len(head) == len(list(learn.model.parameters()))
    again = dgc_learner(dls, "dgc_densenet22", **TINY)
    assert len(dls.after_batch.fs.filter(lambda f: isinstance(f, Normalize))) == 1
    save_checkpoint(learn.model, tmp_path / "net.safetensors")
    load_checkpoint(again.model, tmp_path / "net.safetensors")
    assert equal_states(again.model.state_dict(), learn.model.state_dict())


def test_dgc_learner_normalizes_where_the_data_are(dls, monkeypatch):
    # A GPU is there, and the data are on the CPU all the same.
    monkeypatch.setattr("fastai.torch_core.default_device", lambda *_: torch.device("meta"))
    learn = dgc_learner(dls, "dgc_densenet22")
    (norm,) = learn.dls.after_batch.fs.filter(lambda f: isinstance(f, Normalize))
    assert norm.mean.device == norm.std.device == dls.device
    assert learn.dls.one_batch()[0].mean().abs() < 3


def test_dgc_learner_refuses_what_it_cannot_use(dls):
    with pytest.raises(TypeError, match="growht"):
        dgc_learner(dls, "dgc_densenet22", growht=8)
    with pytest.raises(TypeError, match="heads: a network that exists already takes no keywords"):
        dgc_learner(dls, timm.create_model("dgc_densenet22"), heads=8)
    dls.vocab, dls.c = [], 0
    with pytest.raises(ValueError, match="number of classes"):
        dgc_learner(dls, "dgc_densenet22")


def test_networks_of_others_converted_or_not(dls):
    import torchvision

    for model in (torchvision.models.resnet18(num_classes=2), timm.create_model("resnet10t", num_classes=2)):
        learn = dgc_learner(dls, convert(model), metrics=accuracy)
        with learn.no_bar(), learn.no_logging():
            learn.fine_tune(2, 1e-3)
        assert inactive(learn) == pytest.approx(0.75, abs=0.01)
        assert len(learn.opt.param_lists) == 2 and len(learn.opt.param_lists[1]) == 2


def test_discriminative_rates_accumulation_and_mixup(dls):
    learn = dgc_learner(dls, "dgc_densenet22", **TINY)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, slice(1e-5, 1e-2), cbs=[MixUp(), GradientAccumulation(16)])
    body, head = learn.opt.hypers
    assert body["lr"] < head["lr"]
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()


def test_lr_find_leaves_weights_and_gates(dls):
    learn = dgc_learner(dls, "dgc_densenet22", **TINY)
    set_progress(learn.model, 0.5)
    before = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        found = learn.lr_find(num_it=12, show_plot=False)
    assert 0 < found.valley < 10
    after = learn.model.state_dict()
    assert equal_states(after, before)


def test_predictions_results_and_interpretation(dls, pictures):
    learn = dgc_learner(dls, "dgc_densenet22", metrics=accuracy, **TINY)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        probabilities, targets, losses = learn.get_preds(with_loss=True)
        assert probabilities.shape == (8, 2) and sorted(targets.tolist()) == [0] * 4 + [1] * 4
        assert torch.allclose(probabilities.sum(1), torch.ones(8)) and losses.isfinite().all()
        assert learn.predict(next((pictures / "val" / "cat").iterdir()))[0] in ("cat", "dog")
        assert learn.validate()[1] == pytest.approx((probabilities.argmax(1) == targets).float().mean())
        learn.show_results(max_n=4)
        assert len([axes for axes in plt.gcf().axes if axes.get_images()]) == 4
        interpretation = Interpretation.from_learner(learn)
        assert len(interpretation.top_losses(3)[0]) == 3
        interpretation.plot_top_losses(2)
    plt.close("all")


@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_as_fastai_does_it(dls):
    # Without CUDA fastai's own autocast warns and stays off: that nothing breaks is all there is to see here.
    learn = dgc_learner(dls, "dgc_densenet22", **TINY).to_fp16()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()
    assert learn.to_fp32().model is learn.model


def test_an_exported_learner_works_in_another_process(dls, pictures, tmp_path):
    learn = dgc_learner(dls, "dgc_densenet22", metrics=accuracy, path=tmp_path, **TINY)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
        picture = next((pictures / "val" / "dog").iterdir())
        expected = learn.predict(picture)[2]
        learn.save("stage")
        learn.load("stage")
        learn.export("net.pkl")
        learn.export("net.pkl")  # again: exporting leaves the learner as it was
        again = load_learner(tmp_path / "net.pkl")
        with again.no_bar():
            assert torch.equal(again.predict(picture)[2], expected)
    assert inactive(again) == inactive(learn) > 0.7
    code = (
        "import sys; from fastai.learner import load_learner; learn = load_learner(sys.argv[1])\n"
        "with learn.no_bar(): print(learn.predict(sys.argv[2])[0])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "net.pkl"), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == learn.dls.vocab[int(expected.argmax())]
