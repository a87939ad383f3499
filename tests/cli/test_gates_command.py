"""The command gates: what it prints, what it writes, and which mistakes it tells."""

import json
import shutil

import pytest
import torch
from PIL import Image

from dgc_fastai import build_learner, load_checkpoint, load_recipe
from helpers import QUICKSTART
from helpers.command_line import only
from helpers.datasets import write_imagenet
from helpers.runs import ONE_EPOCH, start

PICTURES = {"layers.png", "classes.png", "images.png", "map.png"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a digits network."""
    folder, _ = start(["train.epochs=2", f"output={tmp_path_factory.mktemp('trained')}"])
    return folder


def test_a_run_s_gates(app, run):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    text = app("gates", run)
    gates = json.loads((run / "gates/gates.json").read_text())
    assert len(gates["verdict"]) == 3
    lines = " ".join(text.split())
    assert all(line in lines for line in gates["verdict"]) and "gates.json and the pictures are in" in lines
    assert {path.name for path in (run / "gates").iterdir()} == PICTURES | {"gates.json"}
    for name in PICTURES:
        Image.open(run / "gates" / name).load()
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != "gates"} == before
    # The numbers are those of the network on its validation images.
    learn = build_learner(load_recipe(run / "recipe.yaml"))
    load_checkpoint(learn.model, run / "best.safetensors")
    with learn.no_bar():
        top_1 = learn.validate()[1]
    assert gates["accuracy"] == gates["controls"]["own"] == pytest.approx(top_1)
    assert gates["images"] == gates["controls"]["images"] == 360 == sum(gates["images_per_class"])
    assert gates["classes"] == [str(digit) for digit in range(10)]
    assert [layer["inactive"] > 0 for layer in gates["layers"]] == [True] * 3
    assert "NaN" not in (run / "gates/gates.json").read_text()
    torch.rand(3)  # the order of the images is fixed all the same
    app("gates", run, "--out", run / "gates/again")
    assert (run / "gates/again/gates.json").read_text() == (run / "gates/gates.json").read_text()
    shutil.rmtree(run / "gates")


def test_pictures_in_a_folder_that_has_moved(app, tmp_path):
    write_imagenet(tmp_path / "pets", classes=("cat", "<i>dog & $co$"))
    recipe = "data.name=folder", f"data.path={tmp_path}/pets", "data.size=16", f"output={tmp_path}/runs"
    app(QUICKSTART, *ONE_EPOCH, *recipe)
    weights = only(tmp_path / "runs") / "last.safetensors"
    moved = shutil.move(tmp_path / "pets", tmp_path / "else where")
    text = app("gates", weights, expect=2)
    assert text.startswith("error: data.path: there is no folder") and text.count("\n") == 1
    app("gates", weights, "--data", moved, "--out", tmp_path / "a/b")
    assert json.loads((tmp_path / "a/b/gates.json").read_text())["classes"] == ["<i>dog & $co$", "cat"]
    write_imagenet(tmp_path / "others", classes=("cat", "cow"))
    text = app("gates", weights, "--data", tmp_path / "others", expect=2)
    assert "has other classes than" in text


def test_one_image(app, tmp_path):
    write_imagenet(tmp_path / "pets", classes=("cat", "dog"), valid=1)
    recipe = "data.name=folder", f"data.path={tmp_path}/pets", "data.size=16", f"output={tmp_path}/runs"
    app(QUICKSTART, *ONE_EPOCH, *recipe, "data.batch_size=1", "train.epochs=1", expect=None)
    weights = only(tmp_path / "runs")
    app("gates", weights)
    assert json.loads((weights / "gates/gates.json").read_text())["controls"]["images"] == 2
    (tmp_path / "pets/val/dog/dog_0.JPEG").write_text("no image")
    app("gates", weights / "last.safetensors", expect=2)


def test_mistakes(app, run, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((tmp_path / "nowhere",), "there is no such file"),
        ((QUICKSTART,), "not the weights of a run"),
        ((run, "--out", tmp_path / "file"), "file: cannot make the folder"),
        ((run, "--data", tmp_path), "the digits come with scikit-learn"),
    ):
        text = app("gates", *arguments, expect=2)
        assert text.startswith("error: ") and text.count("\n") == 1 and message in text, text
    app(QUICKSTART, *ONE_EPOCH, "model.arch=dgc_densenet86_dense", f"output={tmp_path}/dense")
    text = app("gates", only(tmp_path / "dense"), expect=2)
    assert "dgc_densenet86_dense has no DGC layers" in text
