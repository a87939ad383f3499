"""Recipes for networks of timm: trained, kept, loaded, deployed."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dgc_fastai import DynamicGroupConv2d, build_learner, deploy, load_recipe, save_checkpoint
from dgc_fastai.analysis.benchmark_plan import plan_benchmark
from dgc_fastai.inference.predict import Predictor
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.models.factory import build_model, network_cost
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.utils.errors import RecipeError
from helpers.golden import equal_states
from helpers.runs import silent

TEXT = """
name: r
model: {arch: resnet10t, convert: {heads: 4, gate_factor: 0.5, skip: ["layer4*"]}}
data: {name: digits, size: 16, batch_size: 400, augment: []}
train: {epochs: 1, lr: 0.01}
"""


@pytest.fixture
def recipe(tmp_path):
    def load(*overrides):
        (tmp_path / "r.yaml").write_text(TEXT)
        return load_recipe(tmp_path / "r.yaml", [f"output={tmp_path}/runs", *overrides])

    return load


def test_from_the_recipe_to_a_prediction(tmp_path, recipe, app):
    torch.manual_seed(3)
    torch.save(timm.create_model("resnet10t", in_chans=1).state_dict(), tmp_path / "w.pth")
    run = TrainingRun(recipe(f"model.weights={tmp_path}/w.pth"))
    assert 0.5 < run.cost.macs / run.cost.macs_dense < 0.9
    folder = run.fit(silent())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["starts_from"] == f"{tmp_path}/w.pth, without its classifier of 1,000 classes"
    assert summary["macs"] == run.cost.macs and summary["best"]["inactive"] > 0.4
    (tmp_path / "w.pth").unlink()  # the run's weights are enough from now on
    predictor = Predictor.from_weights(folder)
    layers = dgc_layers(predictor.model)
    assert len(layers) == 7 and all(layer.gate_factor == 0.5 for layer in layers)
    assert not isinstance(predictor.model.layer4[0].conv1, DynamicGroupConv2d)
    assert equal_states(predictor.model.state_dict(), load_file(folder / "best.safetensors"))
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(deploy(predictor.model)(x), predictor.model(x), rtol=1e-3, atol=1e-3)
    Image.new("L", (40, 30), 128).save(tmp_path / "x.png")
    assert app("predict", folder, tmp_path / "x.png").count(" %") == 3
    # Those weights start another run, of the converted network; they hold all that it has.
    again = TrainingRun(recipe(f"model.weights={folder}")).learner
    assert equal_states(again.model.state_dict(), load_file(folder / "best.safetensors"))
    answer = app("evaluate", folder / "recipe.yaml", "--weights", folder)
    assert f"top-1 {100 * summary['best']['top_1']:.2f} %" in answer


def test_its_baseline_is_the_network_before_conversion(recipe):
    plan = plan_benchmark(recipe("data.batch_size=2"), compiled=False)
    names = [variant.name for variant in plan[0].variants]
    assert "dense" in names and "sgc" not in names and "ours at 1" in names
    with pytest.raises(RecipeError, match=r"model.convert: resnet10t has no gates to benchmark"):
        plan_benchmark(recipe("model.convert=null"), compiled=False)
    gated, dense = recipe().model, recipe().model.dense
    assert network_cost(gated, 10, (1, 16, 16)).macs_dense == network_cost(dense, 10, (1, 16, 16)).macs


def test_a_network_of_one_s_own(recipe):
    torch.manual_seed(0)
    own = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, stride=2), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    )  # fmt: skip
    learn = build_learner(recipe("model.convert.skip=[]"), own)
    assert learn.model is own and isinstance(own[3], DynamicGroupConv2d)
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    assert int(own[3].inactive_channels) == 8
    with pytest.raises(RecipeError, match=r"model: the output for an image is \(16,\), not one of 10 classes"):
        build_learner(recipe("model.convert=null"), torch.nn.Sequential(*own[:-1]))


REFUSED = {
    "misspelt": ("model.arch=resnt18", "model.arch: no network 'resnt18'; did you mean 'resnet18"),
    "ours, misspelt": ("model.arch=dgc_resnet81", "no network 'dgc_resnet81'; did you mean 'dgc_resnet18'?"),
    "no such weights": ("model.arch=resnet18.nobodys", "timm cannot make resnet18.nobodys: Invalid pretrained tag"),
    "no name": ("model.arch=a/b", "no network 'a/b'"),
    "a transformer": (
        "model.arch=vit_tiny_patch16_224",
        "model.convert: the network cannot take images of (1, ",
    ),
    "nothing to convert": ("model.convert.heads=7", "model.convert: ResNet has no convolution to convert (conv1.0: "),
    "a target below the minimum": (
        "model.convert.target=0.01",
        "error: model.convert: target=0.01 is out of reach: with 0.125 of the channels in each layer that can be",
    ),
    "a key of another network": ("model.heads=2", "resnet10t has no keyword heads; set them in model.convert"),
    "an unknown key": (
        "model.convert.hads=2",
        "did you mean 'model.convert.heads'?",
    ),
    "gated already": (
        "model.arch=dgc_resnet18",
        "has DGC layers already; remove it, or use dgc_resnet18_dense",
    ),
    "no convolution": ("model.convert=3", "model.convert=3: input should be a section of keys and values"),
    "no weights": ("model.weights=nowhere.pth", "model.weights: there is no file nowhere.pth; model.weights is a file"),
    "no teacher": ("train.teacher=nowhere", "train.teacher: there is no file nowhere; train.teacher is a file of"),
    "a folder": ("model.weights=.", "model.weights: . has no best.safetensors; name a file of weights, or the folder"),
}


@pytest.mark.parametrize("override, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused_in_a_line(app, recipe, tmp_path, override, message):
    recipe()
    answer = app("check", "r.yaml", override, cwd=tmp_path, expect=2)
    assert message in answer and answer.count("\n") == 1, answer


def test_weights_that_do_not_fit_end_a_training_with_a_line(app, recipe, tmp_path):
    recipe()
    save_checkpoint(timm.create_model("resnet10t"), tmp_path / "color")
    save_checkpoint(build_model(recipe().model, 7, (1, 16, 16)), tmp_path / "w7")
    answer = app("train", "r.yaml", "model.weights=color", cwd=tmp_path, expect=2)
    assert answer == "error: color: its network takes images of 3 channels, and these have 1 channel\n"
    answer = app("train", "r.yaml", "train.teacher=color", cwd=tmp_path, expect=2)
    assert answer == "error: train.teacher: color: a network of 1,000 classes cannot teach one of 10\n"
    answer = app("evaluate", "r.yaml", "--weights", "w7", cwd=tmp_path, expect=2)
    assert "w7: does not fit ResNet: 2 of another shape (fc.weight [7, 512] for [10, 512], fc.bias" in answer
    assert not (tmp_path / "runs").exists()
