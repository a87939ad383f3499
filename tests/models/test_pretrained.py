"""timm's weights in our networks. They are random here: nothing is fetched."""

import pytest
import timm
import torch

from dgc_fastai import load_recipe
from dgc_fastai.models import pretrained
from dgc_fastai.models.pretrained import load_pretrained
from dgc_fastai.recipe.schema import PRETRAINED
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.utils.errors import CheckpointError, RecipeError


@pytest.fixture
def timm_weights(monkeypatch):
    """timm's networks with weights of chance instead of ImageNet's, by name."""
    made = {}

    def fetch(name, in_chans):
        torch.manual_seed(1)
        made[name] = timm.create_model(name, in_chans=in_chans).eval()
        for module in made[name].modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        return made[name]

    monkeypatch.setattr(pretrained, "_fetch", fetch)
    return made


@pytest.mark.parametrize("arch", ["dgc_resnet18", "dgc_resnet50", "dgc_mobilenetv2_100", "dgc_resnet18_dense"])
def test_the_network_computes_what_timms_does(timm_weights, arch):
    keywords = {} if arch.endswith("_dense") else {"zero_init_gates": True}
    keywords |= {"preact": False} if "resnet" in arch and keywords else {}
    network = timm.create_model(arch, num_classes=5, **keywords).eval()
    name = load_pretrained(network, arch)
    x = torch.randn(2, 3, 64, 64)
    source = timm_weights[PRETRAINED[arch.removesuffix("_dense")]]
    assert name == f"{source.pretrained_cfg['architecture']}.{source.pretrained_cfg['tag']}"
    with torch.no_grad():
        torch.testing.assert_close(network.forward_features(x), source.forward_features(x), rtol=1e-3, atol=1e-4)


def test_another_layout_is_refused(timm_weights):
    with pytest.raises(ValueError, match="preact=False"):
        load_pretrained(timm.create_model("dgc_resnet18"), "dgc_resnet18")
    with pytest.raises(ValueError, match="no weights for dgc_densenet22"):
        load_pretrained(timm.create_model("dgc_densenet22"), "dgc_densenet22")


def recipe_of(tmp_path, pretrained):
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nmodel: {arch: dgc_resnet18, preact: false, zero_init_gates: true, "
        f"pretrained: {pretrained}}}\ndata: {{name: digits, size: 32}}\ntrain: {{epochs: 1}}\noutput: {tmp_path}\n"
    )
    return load_recipe(path)


def test_a_recipe_starts_from_them(tmp_path, timm_weights):
    run = TrainingRun(recipe_of(tmp_path, "true"))
    weight = run.learner.model.layer2[0].conv1.weight
    torch.testing.assert_close(weight, timm_weights["resnet18"].layer2[0].conv1.weight, rtol=1e-3, atol=1e-5)
    assert run.starts_from.startswith("resnet18.") and run.learner.model.fc.out_features == 10


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch, caplog):
    def fetch(name, pretrained, in_chans):
        raise FileNotFoundError("An error happened while trying to locate the file. Please check your connection")

    monkeypatch.setattr(pretrained.timm, "create_model", fetch)
    with pytest.raises(CheckpointError, match="^cannot fetch timm's weights of resnet18: An error happened [^.]*$"):
        load_pretrained(torch.nn.Linear(1, 1), "dgc_resnet18")
    monkeypatch.undo()

    def fail(name, in_chans):
        raise CheckpointError("no network")

    monkeypatch.setattr(pretrained, "_fetch", fail)
    with pytest.raises(CheckpointError, match="no network"):
        TrainingRun(recipe_of(tmp_path, "true")).learner  # noqa: B018
    run = TrainingRun(recipe_of(tmp_path, "auto"))
    assert run.learner.model.fc.out_features == 10 and run.starts_from is None
    assert "no network; starting from random weights" in caplog.text


def test_saved_weights_take_their_place(tmp_path, monkeypatch):
    from dgc_fastai import save_checkpoint

    recipe = recipe_of(tmp_path, "auto")
    monkeypatch.setattr(pretrained, "_fetch", lambda *args: pytest.fail("fetched"))
    network = timm.create_model("dgc_resnet18", num_classes=10, in_chans=1, preact=False)
    save_checkpoint(network, tmp_path / "w.safetensors")
    TrainingRun(recipe).load(tmp_path / "w.safetensors")


def test_a_network_without_timms_layout_cannot_be_asked_for(tmp_path):
    with pytest.raises(RecipeError, match="timm has no weights for dgc_densenet86"):
        load_recipe("quickstart", ["model.pretrained=true"])
    with pytest.raises(RecipeError, match="preact: false"):
        load_recipe("imagenet_r18", ["model.pretrained=true"])
    assert load_recipe("quickstart", ["model.pretrained=auto"]).model.pretrained == "auto"
