"""The command line, run as a person runs it, and the run folder it leaves."""

import csv
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.models.factory import network_cost
from dgc_fastai.training.callbacks.run_files import RunFolder
from dgc_fastai.training.learner import evaluate
from helpers import QUICKSTART, ROOT
from helpers.command_line import TINY, only, process
from helpers.datasets import write_cifar, write_imagenet
from helpers.golden import DATA, equal_states, make_state


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    text = process("--help", PYTHONPATH=str(tmp_path))
    assert "RECIPE" in text and "evaluate" in text and "check" in text
    for command in ("evaluate", "check"):
        assert "RECIPE" in process(command, "--help", PYTHONPATH=str(tmp_path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training run from the command line, in a folder that is not the project's."""
    folder = tmp_path_factory.mktemp("run")
    text = process(ROOT / "recipes/quickstart.yaml", "train.epochs=4", "output=runs", *TINY, cwd=folder)
    return text, only(folder / "runs")


def test_a_run_shows_recipe_budget_and_epochs(run):
    text, folder = run
    assert "epochs: 4" in text and "workers: 0" in text  # an override and a default
    assert "stages.0.layers.0.conv1" in text and "The authors' counter" in text
    rows = [line.split() for line in text.splitlines() if line.strip()[:1] in "1234" and "%" in line]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert "top-1" in text and "top-5" in text
    assert f"The run is in runs/{folder.name}." in text
    assert "\x1b" not in text and "\r" not in text


def test_a_run_folder_is_whole(run):
    _, folder = run
    names = {"recipe.yaml", "history.csv", "curves.png", "summary.json", "last.safetensors", "best.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    rows = list(csv.DictReader(open(folder / "history.csv")))
    columns = ["epoch", "train_loss", "valid_loss", "top_1", "top_5", "inactive", "lasso", "lr", "seconds"]
    assert [list(row) for row in rows] == [columns] * 4
    assert float(rows[0]["inactive"]) < float(rows[1]["inactive"]) < float(rows[3]["inactive"]) == 0.75
    assert float(rows[3]["lr"]) < 1e-3 < float(rows[1]["lr"])
    assert load_recipe(folder / "recipe.yaml").train.epochs == 4
    with Image.open(folder / "curves.png") as picture:
        assert picture.size == (1200, 780)
    with safe_open(folder / "last.safetensors", "pt") as file:
        assert file.metadata()["recipe"] == (folder / "recipe.yaml").read_text()
        assert '"9"' in file.metadata()["classes"]


def test_weights_evaluate_to_the_figures_of_the_run(app, run):
    _, folder = run
    rows = list(csv.DictReader(open(folder / "history.csv")))
    text = app("evaluate", folder / "recipe.yaml", "--weights", folder / "last.safetensors")
    top_1, top_5 = 100 * float(rows[3]["top_1"]), 100 * float(rows[3]["top_5"])
    assert text.strip() == f"top-1 {top_1:.2f} %, top-5 {top_5:.2f} %, loss {float(rows[3]['valid_loss']):.4f}"
    best = app("evaluate", folder / "recipe.yaml", "--weights", folder / "best.safetensors")
    closed = max(float(row["top_1"]) for row in rows if row["inactive"] == rows[3]["inactive"])
    assert best.startswith(f"top-1 {100 * closed:.2f} %")


def test_best_is_the_best_of_the_most_closed(tmp_path):
    recipe = load_recipe(QUICKSTART)
    record = RunFolder(tmp_path, recipe, list("0123456789"), network_cost(recipe.model, 10, (1, 8, 8)))
    names = ["epoch", "train_loss", "valid_loss", "top_1", "top_5", "inactive", "lasso", "lr", "time"]
    epochs = [(0.9, 0.0), (0.8, 0.4), (0.7, 0.75), (0.75, 0.75), (0.75, 0.75), (0.6, 0.75)]
    best = []
    for epoch, (top_1, inactive) in enumerate(epochs):
        log = [epoch, 1.0, 1.0, top_1, 1.0, inactive, 1.0, 0.1, "00:01"]
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(epoch)
        record.learn = SimpleNamespace(
            epoch=epoch, model=model, recorder=SimpleNamespace(metric_names=names, log=log)
        )  # fmt: skip
        record.before_epoch()
        record.after_epoch()
        with safe_open(tmp_path / "best.safetensors", "pt") as file:
            best.append(int(file.get_tensor("weight")))
        with safe_open(tmp_path / "last.safetensors", "pt") as file:
            assert file.get_tensor("weight") == epoch
    assert best == [0, 1, 2, 3, 4, 4]  # the later one of equals, as the authors do


def test_check_prints_every_layer_and_writes_nothing(app, tmp_path):
    text = app("check", ROOT / "recipes/quickstart.yaml", "model.stages=[14,14,14]", cwd=tmp_path)
    assert text.count(".conv1 ") == 42 and "total" in text
    assert not list(tmp_path.iterdir())


def test_a_long_budget_is_shown_by_block(app, tmp_path):
    text = app(
        ROOT / "recipes/quickstart.yaml", "model.arch=dgc_densenet86_dense", "model.stages=[14,14,14]",
        "model.growth=[4,4,4]", "train.epochs=1", "data.size=8", "data.batch_size=400", f"output={tmp_path}",
    )  # fmt: skip
    assert "Blocks of layers" in text and "stages.2 " in text and ".conv1" not in text
    assert float(list(csv.DictReader(open(only(tmp_path) / "history.csv")))[0]["inactive"]) == 0


def test_imagenet_s_recipe_trains_two_steps_and_evaluates(app, tmp_path):
    write_imagenet(tmp_path / "imagenet")
    overrides = f"data.path={tmp_path}/imagenet", "data.batch_size=6", "data.workers=1", "data.size=64"
    short = "train.epochs=1", f"output={tmp_path}/runs", "device=cpu"
    recipe = ROOT / "recipes/imagenet_r18.yaml"
    text = app(recipe, *overrides, *short)
    assert "layer4.1.conv2" in text
    folder = only(tmp_path / "runs")
    assert "top-1" in app("evaluate", recipe, *overrides, "device=cpu", "--weights", folder / "last.safetensors")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_s_recipes_train_two_steps_and_evaluate(app, tmp_path, name):
    write_cifar(tmp_path / "data", name)
    overrides = f"data.path={tmp_path}/data", "data.batch_size=20", "device=cpu"
    recipe = ROOT / f"recipes/{name}_densenet86.yaml"
    text = app(recipe, *overrides, "train.epochs=1", f"output={tmp_path}/runs")
    assert "71,037,118 operations" in text if name == "cifar10" else "71,109,208 operations" in text
    published = tmp_path / "published.tar"
    torch.save({"state_dict": make_state(f"{name}_dydensenet86_h4"), "epoch": 299}, published)
    for weights in (only(tmp_path / "runs") / "best.safetensors", published):
        assert "top-1" in app("evaluate", recipe, *overrides, "--weights", weights)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((QUICKSTART, "train.epoch=3"), "train.epoch=3: train.epoch: unknown key; did you mean 'epochs'?"),
        ((QUICKSTART, "train.epochs=ten"), "input should be a valid integer"),
        ((QUICKSTART, "model.gate_factor=0"), "should be greater than 0"),
        ((QUICKSTART, "model.gate_factor=1.5"), "should be less than or equal to 1"),
        ((QUICKSTART, "model.heads=3"), "model: heads=3 does not divide the 32 output channels"),
        ((QUICKSTART, "model.group_3x3=5"), "model: group_3x3=5 does not divide growth=8"),
        ((QUICKSTART, "model.growth=[8,8]"), "model: stages=[4, 4, 4] and growth=[8, 8] differ in length"),
        ((QUICKSTART, "device=cuda:7"), "use device=cpu"),
        ((QUICKSTART, "output=/proc/nowhere"), "output: "),
        ((ROOT / "recipes/cifar10_densenet86.yaml", "data.path=nowhere"), "there is no folder nowhere"),
        ((ROOT / "recipes/imagenet_r18.yaml", "data.path=nowhere"), "there is no folder nowhere"),
        (("recipes/quikstart.yaml",), "cannot read the recipe"),
        ((), "RECIPE"),
        ((QUICKSTART, "--fast"), "--fast"),
        (("evaluate", QUICKSTART), "--weights"),
        (("evaluate", QUICKSTART, "--weights", "nowhere"), "nowhere: cannot read the checkpoint"),
        (("evaluate", QUICKSTART, "--weights", QUICKSTART), "quickstart.yaml: cannot read the checkpoint"),
        (("evaluate", QUICKSTART, "--weights", DATA / "tiny_dydensenet.pth.tar"), "does not fit DGCDenseNet"),
        (("check", QUICKSTART, "nonsense"), "an override reads section.key=value"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(Path(str(part)).name for part in value),
)
def test_mistakes_are_one_line_and_exit_code_2_and_leave_nothing(app, tmp_path, arguments, message):
    if "output=/proc/nowhere" in arguments and os.name != "posix":
        pytest.skip("needs a folder nobody can write to")
    text = app(*arguments, cwd=tmp_path, expect=2)
    assert text.startswith("error: ") and text.count("\n") == 1, text
    assert message in text
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_answered_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    process(QUICKSTART, "train.epoch=3", expect=2, PYTHONPATH=str(tmp_path))
    process(ROOT / "recipes/imagenet_r18.yaml", "data.path=nowhere", expect=2, PYTHONPATH=str(tmp_path))


def test_in_a_notebook_the_same_recipe_gives_a_fastai_learner():
    import matplotlib

    matplotlib.use("Agg")
    recipe = load_recipe(QUICKSTART, ["train.epochs=1", *TINY])
    learn = build_learner(recipe)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
        learn.show_results(max_n=4)
    assert learn.recorder.metric_names[1:-1] == [
        "train_loss", "valid_loss", "top_1", "top_5", "inactive", "lasso", "lr",
    ]  # fmt: skip
    assert "progress" in [cb.name for cb in learn.cbs]
    result = evaluate(learn)
    assert 0 <= result["top_1"] <= result["top_5"] <= 1


def test_the_same_seed_gives_the_same_weights():
    states = []
    for seed in (1, 1, 2):
        recipe = load_recipe(QUICKSTART, ["train.epochs=1", "data.batch_size=400", f"train.seed={seed}", *TINY])
        learn = build_learner(recipe)
        with learn.no_bar(), learn.no_logging():
            learn.fit_recipe()
        states.append({name: tensor.clone() for name, tensor in learn.model.state_dict().items()})
    assert equal_states(states[0], states[1]) and not equal_states(states[0], states[2])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_schedules_and_optimisers(optimizer, schedule):
    overrides = f"train.optimizer={optimizer}", f"train.schedule={schedule}", "train.lr=0.01", "train.weight_decay=0.02"
    recipe = load_recipe(QUICKSTART, ["train.epochs=2", "data.batch_size=400", *overrides, *TINY])
    learn = build_learner(recipe)
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    (group,) = learn.opt.opt.param_groups  # every parameter, norms and biases too, is decayed alike
    assert group["weight_decay"] == 0.02
    assert type(learn.opt.opt).__name__.lower() == optimizer
    rates = learn.recorder.lrs
    if schedule == "cosine":
        import math

        expected = [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
        assert rates == pytest.approx(expected)
        if optimizer == "sgd":
            assert group["nesterov"] and group["momentum"] == 0.9
    else:
        assert rates[0] < rates[2] > rates[-1] and max(rates) <= 0.01
