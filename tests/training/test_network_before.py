"""The network before a compression: whether it is given, or has to be trained."""

import pytest
import timm
import torch

from dgc_fastai import convert, load_recipe, save_checkpoint
from dgc_fastai.recipe.loading import differences
from dgc_fastai.training.compression import check_compression, dense_network, dense_recipe, has_classifier
from dgc_fastai.utils.errors import CheckpointError, RecipeError

TEXT = """
name: r
model: {arch: resnet10t, convert: {heads: 4, gate_factor: 0.5}}
data: {name: digits, size: 32}
train: {epochs: 1, lr: 0.01, teacher: before, teacher_weight: 0.3, lasso_weight: 0.1}
"""


@pytest.fixture
def recipe(tmp_path):
    def load(*overrides):
        (tmp_path / "r.yaml").write_text(TEXT)
        return load_recipe(tmp_path / "r.yaml", overrides)

    return load


def save(path, classes=10, gates=False):
    network = timm.create_model("resnet10t", in_chans=1, num_classes=classes)
    save_checkpoint(convert(network, input_size=(1, 32, 32)) if gates else network, path)
    return f"model.weights={path}"


def test_the_dense_recipe_differs_in_nothing_but_the_conversion(tmp_path, recipe):
    dense = dense_recipe(recipe())
    (tmp_path / "dense.yaml").write_text(dense.to_yaml())
    assert load_recipe(tmp_path / "dense.yaml") == dense
    assert dense == dense_recipe(recipe("model.convert.gate_factor=0.3", "train.teacher_weight=0.9"))
    changed = differences(recipe(), dense)
    assert {name.split()[0].rstrip(":=") for name in changed} <= {
        "name",
        "model.convert",
        "train.teacher",
        "train.teacher_weight",
        "train.lasso_weight",
    } | {f"model.convert.{key}" for key in ("heads", "gate_factor", "squeeze_rate", "skip")}
    long = dense_recipe(recipe(f"name={'n' * 100}"))
    (tmp_path / "dense.yaml").write_text(long.to_yaml())
    assert load_recipe(tmp_path / "dense.yaml") == long


def test_weights_with_the_classes_of_the_data_are_the_network_before(tmp_path, recipe):
    assert not has_classifier(recipe())
    assert not has_classifier(recipe(save(tmp_path / "other.safetensors", classes=7)))
    own = recipe(save(tmp_path / "own.safetensors"))
    assert has_classifier(own)
    network = dense_network(own)
    assert not network.training and network(torch.randn(1, 1, 32, 32)).shape == (1, 10)


def test_weights_with_gates_are_refused(tmp_path, recipe):
    with pytest.raises(CheckpointError, match=r"model\.weights: .*gated\.safetensors is of a network with gates"):
        has_classifier(recipe(save(tmp_path / "gated.safetensors", gates=True)))


def test_weights_that_do_not_fit_are_no_reason_to_train_a_dense_network(tmp_path, recipe):
    save_checkpoint(torch.nn.Linear(3, 10), tmp_path / "linear.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        has_classifier(recipe(f"model.weights={tmp_path}/linear.safetensors"))


@pytest.mark.parametrize("arch, hint", [("resnet10t", "set it$"), ("dgc_resnet18", "model.arch=dgc_resnet18_dense$")])
def test_there_has_to_be_a_conversion(recipe, arch, hint):
    with pytest.raises(RecipeError, match=rf"model\.convert: there is nothing to compress without it; .*{hint}"):
        check_compression(recipe(f"model.arch={arch}", "model.convert=null", "train.teacher=null"))
