"""Learning from a teacher."""

import json

import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.losses import CrossEntropyLossFlat

from dgc_fastai import Distillation, build_learner, dgc_learner, gate_penalty, load_recipe, save_checkpoint
from dgc_fastai.models.factory import build_model
from dgc_fastai.training.callbacks import distillation
from dgc_fastai.training.callbacks.order import ANNEAL_GATES
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.training.teacher import load_teacher
from dgc_fastai.utils.errors import CheckpointError, RecipeError
from helpers import QUICKSTART
from helpers.golden import evaluating, loaders
from helpers.runs import SMALL, StopAt, same_run, start, trained


class Keep(Callback):
    """What a step has seen, and the loss that it differentiates, gate penalty included."""

    order = ANNEAL_GATES + 0.1

    def before_fit(self):
        self.steps = []

    def after_loss(self):
        if self.training:
            penalty = gate_penalty(self.model)
            self.steps.append([one.detach() for one in (*self.xb, self.pred, self.loss, self.loss_grad, penalty)])


def teacher_of(seed=5, **keywords):
    """A network for the digits whose answers are far from equal."""
    torch.manual_seed(seed)
    model = build_model(load_recipe(QUICKSTART, [*SMALL]).model, 10, (1, 8, 8))
    model = evaluating(model, torch.randn(16, 1, 8, 8))
    torch.nn.init.normal_(model.get_classifier().weight, std=1.0)
    return model


@pytest.fixture
def teacher_file(tmp_path):
    """Weights without a recipe."""
    dense = load_recipe(QUICKSTART, [*SMALL]).model.dense
    torch.manual_seed(5)
    save_checkpoint(build_model(dense, 10, (1, 8, 8)), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


@pytest.mark.parametrize("overrides", [[], ["train.mixup=0.4", "train.accumulate=2"]], ids=["plain", "mixed"])
def test_the_loss_is_the_formula_s(overrides):
    teacher, keep = teacher_of(), Keep()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trained(*overrides, "train.lasso_weight=0.01", callbacks=[keep, Distillation(teacher, 0.3, 3.0)])
    assert len(keep.steps) == 4
    for x, pred, loss, loss_grad, penalty in keep.steps:
        with torch.no_grad():
            answers = teacher.eval()(x.as_subclass(torch.Tensor))
        theirs, ours = (answers / 3).softmax(1), (pred.as_subclass(torch.Tensor) / 3).log_softmax(1)
        divergence = (theirs * (theirs.log() - ours)).sum(1).mean()
        assert divergence > 0.01
        expected = 0.7 * loss + 0.3 * 9 * divergence + 0.01 * penalty
        torch.testing.assert_close(float(loss_grad), float(expected), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_computes_in_the_network_s_precision_and_never_in_validation():
    callback, seen = Distillation(teacher_of()), []
    callback.teacher.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trained("train.precision=bf16", callbacks=[callback])
    assert seen == [True] * 4
    seen.clear()
    trained(callbacks=[callback])  # in another fit, in float32
    assert seen == [False] * 4


def test_by_itself_in_a_learner_of_fastai():
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 10
    network = timm.create_model("dgc_densenet22", num_classes=10, in_chans=1, stages=(1,), growth=(8,))
    data, callback = loaders(images, labels, 4), Distillation(teacher_of())
    learn = dgc_learner(data, network, normalize=False, cbs=callback, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert "teacher" not in learn.model.state_dict()


def test_another_number_of_classes_is_refused():
    torch.manual_seed(0)
    other = build_model(load_recipe(QUICKSTART, [*SMALL]).model, 7, (1, 8, 8))
    with pytest.raises(ValueError, match=r"the teacher's output is \[400, 7\], and the network's \[400, 10\]"):
        trained(callbacks=[Distillation(other)])


EVERYTHING = "train.ema=0.9", "train.accumulate=2", "train.mixup=0.2", "train.cutmix=1.0", "model.drop_rate=0.2"


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, teacher_file):
    overrides = [*EVERYTHING, "train.epochs=2", f"train.teacher={teacher_file}"]
    whole, learn = start([*overrides, f"output={tmp_path}/whole"])
    assert learn.distillation.weight == 0.5
    other, _ = start([*EVERYTHING, "train.epochs=2", f"output={tmp_path}/other"])
    assert (other / "last.safetensors").read_bytes() != (whole / "last.safetensors").read_bytes()
    for number, place in enumerate([StopAt(0, 1), StopAt(1, 2)]):
        folder, _ = start([*overrides, f"output={tmp_path}/parts"], resume=number > 0, callback=place)
        assert folder is None
    parts, _ = start([*overrides, f"output={tmp_path}/parts"], resume=True)
    assert same_run(whole, parts)


def test_a_teacher_that_has_changed_does_not_go_on(tmp_path, teacher_file):
    overrides = [f"train.teacher={teacher_file}", f"output={tmp_path}/runs", "train.epochs=2"]
    assert start(overrides, callback=StopAt(0, 1))[0] is None
    model = build_model(load_recipe(QUICKSTART, [*SMALL]).model.dense, 10, (1, 8, 8))
    save_checkpoint(model, teacher_file)
    with pytest.raises(CheckpointError, match="the teacher's weights are not those that the run began with"):
        start(overrides, resume=True)


def test_a_teacher_is_known_by_its_weights_however_it_is_deployed(monkeypatch):
    first = Distillation(teacher_of())
    monkeypatch.setattr(distillation, "deploy", lambda teacher: torch.nn.Sequential(teacher))
    Distillation(teacher_of()).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="not those that the run began with"):
        Distillation(teacher_of(6)).load_state_dict(first.state_dict())


CONVERTED = """
name: converted
model: {arch: resnet10t, weights: WEIGHTS, convert: {gate_factor: 0.5}}
data: {name: digits, size: 32, batch_size: 600, augment: []}
train: {epochs: 1, teacher: before, lr: 0.01}
"""


@pytest.fixture
def converted(tmp_path):
    def recipe(weights, *overrides):
        (tmp_path / "r.yaml").write_text(CONVERTED.replace("WEIGHTS", str(weights)))
        return load_recipe(tmp_path / "r.yaml", [f"output={tmp_path}/runs", *overrides])

    return recipe


def test_the_network_before_conversion_teaches(tmp_path, converted):
    torch.manual_seed(3)
    dense = evaluating(timm.create_model("resnet10t", num_classes=10, in_chans=1), torch.randn(4, 1, 32, 32))
    torch.nn.init.normal_(dense.fc.weight, std=0.5)
    save_checkpoint(dense, tmp_path / "w")
    learn = TrainingRun(converted(tmp_path / "w")).learner
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(learn.distillation.teacher(x), dense(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(learn.model.eval()(x), dense(x), rtol=1e-2, atol=1e-2)
    resumed = TrainingRun(converted(tmp_path / "w"), gets_weights=True).learner
    assert resumed.distillation.state_dict() == learn.distillation.state_dict()
    validating = TrainingRun(converted(tmp_path / "w", "train.teacher=nowhere"))
    save_checkpoint(learn.model, tmp_path / "gated")
    validating.load(tmp_path / "gated")  # needs no teacher
    assert not hasattr(validating.learner, "distillation")
    own = build_learner(converted("null"), dense)
    with torch.no_grad():
        torch.testing.assert_close(own.distillation.teacher(x), own.model.eval()(x), rtol=1e-2, atol=1e-2)


def test_teachers_that_cannot_teach_are_refused_in_a_line(tmp_path, converted, teacher_file):
    def refusal(recipe):
        with pytest.raises((CheckpointError, RecipeError)) as error:
            TrainingRun(recipe).learner  # noqa: B018
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "before model.convert: it has no weights; set model.weights" in refusal(converted("null"))
    save_checkpoint(timm.create_model("resnet10t", num_classes=7, in_chans=1), tmp_path / "w7")
    refused = f"{tmp_path}/w7: a network of 7 classes cannot teach one of 10"
    assert refusal(converted(tmp_path / "w7")) == f"{refused}; `compress` trains the network before first"
    file = converted("null", f"train.teacher={tmp_path}/w7")
    assert refusal(file) == f"train.teacher: {tmp_path}/w7: a network of 7 classes cannot teach one of 10"
    assert "does not fit" in refusal(converted("null", f"train.teacher={teacher_file}"))
    with pytest.raises(RecipeError, match="train.teacher=before: train.teacher: before is the network before"):
        load_recipe(QUICKSTART, ["train.teacher=before"])


def test_a_run_teaches_with_its_own_recipe(tmp_path):
    """The weights of a run tell their network: a wider one than that which learns."""
    wide = ["model.growth=[8,8,8]", "train.epochs=1"]
    run, _ = start([*wide, f"output={tmp_path}/teacher"])
    folder, learn = start([f"train.teacher={run}", "train.epochs=1", f"output={tmp_path}/runs"])
    assert folder and learn.distillation.teacher.num_features > learn.model.num_features
    with pytest.raises(CheckpointError, match=r"has 10 classes \(0, 1, 2, ...\), and the data have 2 \(a, b\)"):
        load_teacher(run, load_recipe(QUICKSTART), ["a", "b"])


def test_a_teacher_that_takes_larger_images_only_is_refused(tmp_path):
    recipe = load_recipe(QUICKSTART, ["model.stages=[1,1,1,1,1]", "model.growth=[8,8,8,8,8]", "data.size=32"])
    digits = [str(digit) for digit in range(10)]
    metadata = {"recipe": recipe.to_yaml(), "classes": json.dumps(digits)}
    save_checkpoint(build_model(recipe.model, 10, (1, 32, 32)), tmp_path / "best.safetensors", metadata)
    load_teacher(tmp_path, recipe, digits)
    with pytest.raises(CheckpointError, match="^train.teacher: .*best.safetensors: the network cannot take images"):
        load_teacher(tmp_path, load_recipe(QUICKSTART), digits)
