"""The weights that a run starts from. timm's are random here: nothing is fetched."""

import copy

import pytest
import timm
import torch
import torchvision
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat

from dgc_fastai import convert, load_recipe, save_checkpoint
from dgc_fastai.models import weights
from dgc_fastai.models.weights import Weights, load_weights, read_weights
from dgc_fastai.recipe.schema import Model
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.utils.errors import CheckpointError, RecipeError
from helpers.golden import evaluating


def timm_network(name, in_chans=3, **keywords):
    """A network of timm's, as if it had been trained."""
    torch.manual_seed(1)
    model = timm.create_model(name, in_chans=in_chans, **keywords)
    return evaluating(model, torch.randn(2, in_chans, 64, 64))


@pytest.fixture
def timm_weights(monkeypatch):
    """timm's networks with weights of chance instead of ImageNet's, by name."""
    made = {}

    def fetch(name, in_chans):
        made[name] = timm_network(name, in_chans)
        return made[name]

    monkeypatch.setattr(weights, "_fetch", fetch)
    return made


def start(network, in_chans=3, **model):
    return load_weights(network, read_weights(Model(**model), in_chans))


def same_features(ours, theirs, tolerance=1e-3):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval().forward_features(x), theirs.eval().forward_features(x), rtol=tolerance, atol=tolerance / 10
        )


@pytest.mark.parametrize("arch", ["dgc_resnet18", "dgc_resnet50", "dgc_mobilenetv2_100", "dgc_resnet18_dense"])
def test_the_network_computes_what_timms_does(timm_weights, arch):
    keywords = {} if arch.endswith("_dense") else {"zero_init_gates": True}
    keywords |= {"preact": False} if "resnet" in arch and keywords else {}
    network = timm.create_model(arch, num_classes=5, **keywords)
    name = start(network, arch=arch, weights="pretrained", **keywords)
    (source,) = timm_weights.values()
    cfg = source.pretrained_cfg
    assert name == f"{cfg['architecture']}.{cfg['tag']}, without its classifier of 1,000 classes"
    same_features(network, source)


def test_another_layout_is_refused(timm_weights):
    network = timm.create_model("dgc_resnet18")
    with pytest.raises(CheckpointError, match=r"does not fit .*missing \(layer1.0.conv1.norm.weight, "):
        start(network, arch="dgc_resnet18", preact=False, weights="pretrained")
    with pytest.raises(CheckpointError, match="timm has no weights for dgc_densenet22"):
        read_weights(Model(arch="dgc_densenet22", weights="auto"), 3)


def fastai_save(model, path):
    """What `learn.save` writes after a step: the state of the optimizer, too."""
    data = DataLoaders.from_dsets([(torch.randn(3, 64, 64), 1)] * 2, [(torch.randn(3, 64, 64), 1)], bs=2)
    learn = Learner(data, copy.deepcopy(model), CrossEntropyLossFlat(), lr=0, wd=0, path=path.parent, model_dir=".")
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    learn.model.load_state_dict(model.state_dict())
    learn.save("learner").rename(path)


SAVERS = {
    "safetensors": lambda model, path: save_checkpoint(model, path),
    "a state dict": lambda model, path: torch.save(model.state_dict(), path),
    "timm's": lambda model, path: torch.save({"epoch": 3, "state_dict": model.state_dict()}, path),
    "fastai's": lambda model, path: fastai_save(model, path),
    "of several processes": lambda model, path: torch.save(
        {f"module.{name}": value for name, value in model.state_dict().items()}, path
    ),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_a_file_of_any_usual_kind(tmp_path, save):
    source, network = timm_network("resnet10t"), timm.create_model("resnet10t", num_classes=5)
    save(source, tmp_path / "w")
    text = start(network, arch="resnet10t", weights=str(tmp_path / "w"))
    assert text == f"{tmp_path}/w, without its classifier of 1,000 classes"
    same_features(network, source, 1e-6)
    network = timm.create_model("resnet10t")
    assert start(network, arch="resnet10t", weights=str(tmp_path / "w")) == f"{tmp_path}/w"
    torch.testing.assert_close(network.fc.weight, source.fc.weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "resnext50_32x4d"])
def test_torchvisions_weights_of_the_same_layout(name):
    theirs = evaluating(torchvision.models.get_model(name), torch.randn(2, 3, 64, 64))
    network = timm.create_model(name).eval()
    assert load_weights(network, Weights(theirs.state_dict(), "theirs")) == "theirs"
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_a_classifier_without_a_shape_is_left_out_or_refused():
    network = timm.create_model("resnet10t", num_classes=5)
    state = {**timm_network("resnet10t", num_classes=5).state_dict(), "fc.bias": torch.tensor(1.0)}
    assert load_weights(network, Weights(dict(state), "w")) == "w, which has no classifier"
    with pytest.raises(CheckpointError, match=r"of another shape \(fc.bias \[\] for \[5\]\)"):
        load_weights(network, Weights(state, "w"), with_classifier=True)


def test_timm_knows_the_names_of_others():
    """ConvNeXt's authors have other names, which timm renames."""
    source = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), conv_mlp=False)
    state = {}
    for name, value in source.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace("mlp.fc", "pwconv").replace("conv_dw", "dwconv")
        for stage in range(4):
            name = name.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
            name = name.replace(f"stages.{stage}.blocks.", f"stages.{stage}.")
        state[name.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = value
    network = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), conv_mlp=False)
    assert load_weights(network, Weights(state, "theirs")) == "theirs"
    same_features(network, source, 1e-6)


def test_weights_before_and_after_conversion(tmp_path):
    source = timm_network("resnet10t", num_classes=5)
    gated = convert(timm.create_model("resnet10t", num_classes=5))
    with pytest.raises(CheckpointError, match="unexpected"):
        load_weights(timm.create_model("resnet10t", num_classes=5), Weights(gated.state_dict(), "gated"))
    load_weights(gated, Weights(source.state_dict(), "dense"))  # opens the gates
    same_features(gated, source)
    again = convert(timm.create_model("resnet10t", num_classes=5))
    load_weights(again, Weights(gated.state_dict(), "gated"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in gated.state_dict().items())


REFUSED = {
    "another network": (lambda: timm.create_model("resnet18").state_dict(), "does not fit ResNet: .*missing"),
    "other images": (
        lambda: timm.create_model("resnet10t", in_chans=1).state_dict(),
        "w: its network takes images of 1 channel, and these have 3 channels$",
    ),
    "no names": (lambda: {0: torch.zeros(1)}, "it holds no state_dict"),
    "a list": (lambda: [torch.zeros(1)], "it holds no state_dict"),
    "nothing": (dict, "it holds no state_dict"),
    "code": (lambda: timm.create_model("resnet10t"), "it holds more than weights"),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_files_that_do_not_fit_are_refused_in_a_line(tmp_path, content, message):
    torch.save(content(), tmp_path / "w")
    network = timm.create_model("resnet10t", num_classes=5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        start(network, arch="resnet10t", weights=str(tmp_path / "w"))
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.fixture
def hub(monkeypatch):
    """A hub with one repository of resnet10t."""
    source = timm_network("resnet10t")
    monkeypatch.setattr(weights, "load_model_config_from_hf", lambda name: ({}, "resnet10t", {}))
    monkeypatch.setattr(weights, "load_state_dict_from_hf", lambda name, weights_only: source.state_dict())
    return source


def test_a_repository_of_the_hub(hub):
    network = timm.create_model("resnet10t", num_classes=5)
    assert start(network, arch="resnet10t", weights="hf-hub:a/b").startswith("hf-hub:a/b, without its classifier")
    same_features(network, hub, 1e-6)
    with pytest.raises(CheckpointError, match="hf-hub:a/b: holds weights of resnet10t, which do not fit resnet18"):
        read_weights(Model(arch="resnet18", weights="hf-hub:a/b"), 3)
    with pytest.raises(RecipeError, match="'hf-hub:nobody' is not the name of a repository; use hf-hub:OWNER/NAME"):
        load_recipe("quickstart", ["model.weights=hf-hub:nobody"])


def recipe_of(tmp_path, source, *overrides, arch="dgc_resnet18, preact: false, zero_init_gates: true"):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: r\nmodel: {{arch: {arch}, weights: {source}}}\ndata: {{name: digits, size: 32}}\n"
        f"train: {{epochs: 1}}\noutput: {tmp_path}\n"
    )
    return load_recipe(path, overrides)


def test_a_recipe_starts_from_them(tmp_path, timm_weights):
    run = TrainingRun(recipe_of(tmp_path, "pretrained"))
    weight = run.learner.model.layer2[0].conv1.weight
    torch.testing.assert_close(weight, timm_weights["resnet18"].layer2[0].conv1.weight, rtol=1e-3, atol=1e-5)
    assert run.starts_from.startswith("resnet18.") and run.learner.model.fc.out_features == 10


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch, caplog):
    def fetch(*args, **kwargs):
        raise FileNotFoundError("An error happened while trying to locate the file. Please check your connection")

    with monkeypatch.context() as patch:
        patch.setattr(weights.timm, "create_model", fetch)
        with pytest.raises(CheckpointError, match="^cannot fetch timm's weights of resnet18: An error happened [^.]*$"):
            read_weights(Model(arch="resnet18", weights="pretrained"), 3)
        patch.setattr(weights, "load_model_config_from_hf", fetch)
        with pytest.raises(CheckpointError, match="^cannot fetch hf-hub:a/b: An error happened [^.]*$"):
            read_weights(Model(arch="resnet18", weights="hf-hub:a/b"), 3)

    def fail(name, in_chans):
        raise CheckpointError("no network")

    monkeypatch.setattr(weights, "_fetch", fail)
    with pytest.raises(CheckpointError, match="no network"):
        TrainingRun(recipe_of(tmp_path, "pretrained")).learner  # noqa: B018
    run = TrainingRun(recipe_of(tmp_path, "auto"))
    assert run.learner.model.fc.out_features == 10 and run.starts_from is None
    assert "no network; starting from random weights" in caplog.text


def test_saved_weights_take_their_place(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, "auto")
    monkeypatch.setattr(weights, "_fetch", lambda *args: pytest.fail("fetched"))
    network = timm.create_model("dgc_resnet18", num_classes=10, in_chans=1, preact=False)
    save_checkpoint(network, tmp_path / "w.safetensors")
    TrainingRun(recipe).load(tmp_path / "w.safetensors")


def test_a_network_without_timms_layout_cannot_be_asked_for(tmp_path):
    with pytest.raises(RecipeError, match="timm has no weights for dgc_densenet86"):
        load_recipe("quickstart", ["model.weights=pretrained"])
    with pytest.raises(RecipeError, match="preact: false"):
        load_recipe("imagenet_r18", ["model.weights=pretrained"])
    assert load_recipe("quickstart", ["model.weights=auto"]).model.weights == "auto"


@pytest.mark.parametrize("old, new", [("true", "pretrained"), ("auto", "auto"), ("false", None)])
def test_the_key_s_old_name_and_values_are_accepted(tmp_path, old, new):
    """Weights of earlier versions carry `model.pretrained`."""
    recipe = recipe_of(tmp_path, "x.pth")
    text = (tmp_path / "r.yaml").read_text().replace("weights: x.pth", f"pretrained: {old}")
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").model.weights == new
    assert load_recipe("pictures_resnet18", [f"model.pretrained={old}"]).model.weights == new
    assert recipe.model.weights == "x.pth"


def with_the_names_of_efficientnet_pytorch(network):
    """A network's tensors by the names of EfficientNet-PyTorch, which counts blocks through, and norms from 0."""
    state = {}
    for number, block in enumerate(block for stage in network.blocks for block in stage):
        names = {"bn1": "_bn1", "conv_dw": "_depthwise_conv", "bn2": "_bn2", "conv_pw": "_project_conv"}
        if hasattr(block, "conv_pwl"):
            names = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
            names |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
        names |= {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
        for name, tensor in block.state_dict().items():
            layer, _, kind = name.rpartition(".")
            state[f"_blocks.{number}.{names[layer]}.{kind}"] = tensor
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for name, layer in outside.items():
        state |= {f"{layer}.{kind}": tensor for kind, tensor in network.get_submodule(name).state_dict().items()}
    return state


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_the_names_of_efficientnet_pytorch(tmp_path, arch):
    theirs = timm.create_model(arch, num_classes=7)
    for index, tensor in enumerate(theirs.state_dict().values()):  # no two tensors are alike
        tensor.fill_(1 + index)
    torch.save(with_the_names_of_efficientnet_pytorch(theirs), tmp_path / "lite.pth")
    for classes, left_out in ((7, ""), (3, ", without its classifier of 7 classes")):
        ours = timm.create_model(arch, num_classes=classes)
        text = start(ours, arch=arch, weights=f"{tmp_path}/lite.pth")
        assert text == f"{tmp_path}/lite.pth{left_out}"
        same = {name for name, tensor in ours.state_dict().items() if torch.equal(tensor, theirs.state_dict()[name])}
        different = ours.state_dict().keys() - same
        assert different == ({"classifier.weight", "classifier.bias"} if left_out else set())
    with pytest.raises(CheckpointError, match="does not fit ResNet"):
        start(timm.create_model("resnet18"), arch="resnet18", weights=f"{tmp_path}/lite.pth")
