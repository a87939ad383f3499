"""timm's optimizers by name, and their parameter groups."""

import pytest
import timm.optim
import torch

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.training.optimizer import build_optimizer
from dgc_fastai.utils.errors import RecipeError
from helpers import QUICKSTART
from helpers.runs import ONE_EPOCH, trained


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "lion", "adafactor", "rmsproptf", "adan", "lamb", "nadamw"])
def test_timm_s_optimizers_by_name(name):
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
    ids=["misspelt", "unknown", "second order", "package missing"],
)
def test_optimizers_that_cannot_be_used(name, message):
    with pytest.raises(RecipeError, match=message):
        build_learner(load_recipe(QUICKSTART, [*ONE_EPOCH, f"train.optimizer={name}"]))


def test_normalization_layers_and_biases_can_be_spared_from_decay():
    learn = trained("train.decay_norms=false", "train.weight_decay=0.3")
    decayed, spared = learn.opt.opt.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0)
    assert decayed["lr"] == spared["lr"]
    names = {id(parameter): name for name, parameter in learn.model.named_parameters()}
    spared = {names[id(parameter)] for parameter in spared["params"]}
    assert spared == {name for name in names.values() if ".norm." in f".{name}" or name.endswith("bias")}
    assert any(name.endswith("gates.bias") for name in spared)
    assert len(decayed["params"]) + len(spared) == len(names)


@pytest.mark.parametrize(
    "name, is_cuda, fused",
    [("sgd", True, True), ("adamw", True, True), ("adamw", False, None)],
    ids=["sgd on a GPU", "adamw on a GPU", "adamw on a CPU"],
)
def test_the_common_optimizers_are_fused_on_a_gpu(monkeypatch, name, is_cuda, fused):
    class Parameter(torch.nn.Parameter):  # there may be no GPU here
        is_cuda = False

    Parameter.is_cuda = is_cuda
    asked = {}

    def create(parameters, *args, **keywords):
        asked.update(keywords)
        return torch.optim.SGD(parameters, lr=0.1)

    monkeypatch.setattr("dgc_fastai.training.optimizer.create_optimizer_v2", create)
    train = load_recipe(QUICKSTART, [*ONE_EPOCH, f"train.optimizer={name}"]).train
    build_optimizer([[Parameter(torch.zeros(2))]], 0.1, train)
    assert asked.get("fused") is fused
