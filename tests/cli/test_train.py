"""train: what a run prints and leaves behind, and how it is stopped and resumed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dgc_fastai import load_recipe
from helpers import QUICKSTART, ROOT
from helpers.command_line import TINY, only, process
from helpers.datasets import write_cifar, write_imagenet
from helpers.golden import make_state
from helpers.runs import TINY as LARGE_BATCHES

SHORT = [*LARGE_BATCHES, "train.epochs=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training run from the command line, in a folder that is not the project's."""
    folder = tmp_path_factory.mktemp("run")
    text = process(
        ROOT / "recipes/quickstart.yaml", "train.epochs=4", "output=runs", *TINY, "log.report=true", cwd=folder
    )
    return text, only(folder / "runs")


def test_a_run_shows_recipe_budget_and_epochs(run):
    text, _folder = run
    assert "epochs: 4" in text and "workers: 0" in text  # an override and a default
    assert "MACs, target" in text and "authors' count" in text and "conv1" not in text
    rows = [line.split() for line in text.splitlines() if line.strip()[:1] in "1234" and "%" in line]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert "top-1" in text and "top-5" in text
    assert "\x1b" not in text and "\r" not in text


def test_a_run_ends_with_what_it_reached(app, run):
    text, folder = run
    rows = list(csv.DictReader(open(folder / "history.csv")))
    best = max((row for row in rows if row["inactive"] == rows[-1]["inactive"]), key=lambda row: float(row["top_1"]))
    *_, place, reached, weights, command, report = text.splitlines()
    assert place == f"The run is in runs/{folder.name}."
    assert reached == (
        f"Best: top-1 {100 * float(best['top_1']):.2f} % in epoch {best['epoch']}, with 75 % of the channels inactive; "
        "0.02 M MACs, 70 % of dense."
    )
    assert weights == f"Its weights: runs/{folder.name}/best.safetensors"
    assert report == f"Its report: runs/{folder.name}/report.html"
    assert command == f"To classify images: python {ROOT / 'app.py'} predict runs/{folder.name} IMAGE ..."
    # And the command works.
    Image.new("L", (8, 8)).save(folder.parent.parent / "zero.png")
    assert "zero.png" in app("predict", f"runs/{folder.name}", "zero.png", cwd=folder.parent.parent)


def test_quiet_prints_the_result_only(app, tmp_path):
    lines = app("train", "quickstart", "-q", *SHORT, "train.epochs=1", "output=runs", cwd=tmp_path).splitlines()
    assert len(lines) == 4 and lines[0].startswith("The run is in runs/")


def test_the_report_tells_of_the_run(run):
    _, folder = run
    page = (folder / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])["runs"][0]
    environment = data["summary"]["environment"]
    assert "train.epochs=4 output=runs 'model.stages=[1,1,1]'" in environment["command"]
    assert environment["device"] == "cpu" and environment["versions"]["torch"] and environment["processor"]
    assert data["latency"] and data["evaluation"]["images"] == 360 and len(data["gates"]["layers"]) == 3


def test_a_run_folder_is_whole(run):
    _, folder = run
    names = {"recipe.yaml", "history.csv", "curves.png", "summary.json", "last.safetensors", "best.safetensors"}
    names |= {"report.html"}
    assert {path.name for path in folder.iterdir()} == names
    rows = list(csv.DictReader(open(folder / "history.csv")))
    columns = ["epoch", "train_loss", "valid_loss", "top_1", "top_5", "inactive", "gate_penalty", "lr", "seconds"]
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


def test_imagenet_s_recipe_trains_two_steps_and_evaluates(app, tmp_path):
    write_imagenet(tmp_path / "imagenet")
    overrides = f"data.path={tmp_path}/imagenet", "data.batch_size=6", "data.workers=1", "data.size=64"
    short = "train.epochs=1", f"output={tmp_path}/runs", "device=cpu"
    recipe = ROOT / "recipes/imagenet_r18.yaml"
    app(recipe, *overrides, *short)
    folder = only(tmp_path / "runs")
    assert "top-1" in app("evaluate", recipe, *overrides, "device=cpu", "--weights", folder / "last.safetensors")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_s_recipes_train_two_steps_and_evaluate(app, tmp_path, name):
    write_cifar(tmp_path / "data", name)
    overrides = f"data.path={tmp_path}/data", "data.batch_size=20", "device=cpu"
    recipe = ROOT / f"recipes/{name}_densenet86.yaml"
    text = app(recipe, *overrides, "train.epochs=1", f"output={tmp_path}/runs")
    assert re.search(f"authors' count +{'71,037,118' if name == 'cifar10' else '71,109,208'} ", text)
    published = tmp_path / "published.tar"
    torch.save({"state_dict": make_state(f"{name}_dydensenet86_h4"), "epoch": 299}, published)
    for weights in (only(tmp_path / "runs") / "best.safetensors", published):
        assert "top-1" in app("evaluate", recipe, *overrides, "--weights", weights)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_the_run_and_resume_goes_on_with_it(app, tmp_path, number, code):
    overrides = [*LARGE_BATCHES, "train.epochs=20", "output=runs"]
    if number == signal.SIGINT:  # as a terminal sends it: to the processes that read files, too
        write_imagenet(tmp_path / "images", train=20)
        overrides += ["data.name=folder", f"data.path={tmp_path}/images", "data.size=16", "data.workers=1"]
        overrides += ["data.batch_size=5"]
    command = [sys.executable, str(ROOT / "app.py"), str(QUICKSTART), *overrides]
    training = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/history.csv")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(training.pid, number)
    _, errors = training.communicate(timeout=60)
    assert training.returncode == code and "Traceback" not in errors, errors
    folder = only(tmp_path / "runs")
    assert re.search(r"interrupted (in|after) epoch \d+ of 20", errors)
    assert f"to go on: python {ROOT / 'app.py'} {Path('runs') / folder.name / 'recipe.yaml'} --resume" in errors
    text = app(Path("runs") / folder.name / "recipe.yaml", "--resume", cwd=tmp_path)
    assert f"Going on with runs/{folder.name}." in text and f"The run is in runs/{folder.name}." in text
    history = list(csv.DictReader(open(folder / "history.csv")))
    assert [int(row["epoch"]) for row in history] == list(range(1, 21))
    assert not (folder / "state.pt").exists()


def test_resume_starts_a_run_where_there_is_none(app, tmp_path):
    text = app(QUICKSTART, *SHORT, f"output={tmp_path}", "--resume")
    assert f"No interrupted run of this recipe below {tmp_path}: starting one." in text
    assert (only(tmp_path) / "last.safetensors").exists()
