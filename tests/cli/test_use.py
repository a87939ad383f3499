"""predict and export."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.inference.predict import Predictor
from helpers import QUICKSTART, ROOT
from helpers.command_line import only
from helpers.datasets import write_imagenet
from helpers.golden import DATA
from helpers.runs import TINY

SHORT = [*TINY, "train.epochs=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of a digits network that has learned something, and files of the digits it was validated on."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, str(ROOT / "app.py"), str(QUICKSTART), "model.stages=[2,2]", "model.growth=[8,8]",
               "train.epochs=6", "data.batch_size=100", f"output={folder}/runs"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    run = only(folder / "runs")
    learn = build_learner(load_recipe(run / "recipe.yaml"))
    files = []
    for number in range(40):
        files.append(folder / f"{number}.png")
        Image.fromarray(learn.dls.valid_ds.images[number, 0].numpy()).save(files[-1])
    return run, files, learn


def test_predictions_are_the_network_s(app, trained):
    run, files, learn = trained
    weights = run / "best.safetensors"
    answers = [json.loads(line) for line in app("predict", weights, *files, "--json", "--top", "10").splitlines()]
    learn.model.load_state_dict(load_file(weights))
    with learn.no_bar():
        probabilities, labels = learn.get_preds()
    for answer, file, expected in zip(answers, files, probabilities):
        assert answer["image"] == str(file)
        found = {int(one["class"]): one["probability"] for one in answer["predictions"]}
        assert [found[number] for number in range(10)] == pytest.approx(expected.tolist(), abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    right = [int(a["predictions"][0]["class"]) == y for a, y in zip(answers, labels.tolist())]
    assert np.mean(right) > 0.4  # of ten classes, after six short epochs
    text = app("predict", weights, files[0])
    name, share = answers[0]["predictions"][0].values()
    assert re.search(rf"{name} {100 * share:.2f} %", text) and text.count(" %") == 3
    assert app("predict", run, files[0]) == text, "a run folder stands for its best.safetensors"


def test_predictions_for_a_folder_of_one_s_own(app, tmp_path):
    write_imagenet(tmp_path / "pets", classes=("cat", "dog"))
    recipe = "data.name=folder", f"data.path={tmp_path}/pets", "data.size=16", f"output={tmp_path}/runs"
    app(QUICKSTART, *SHORT, *recipe)
    weights = only(tmp_path / "runs") / "last.safetensors"
    moved = shutil.move(tmp_path / "pets", tmp_path / "elsewhere")  # the weights are enough
    answer = json.loads(app("predict", weights, f"{moved}/val/dog/dog_0.JPEG", "--json"))
    assert {one["class"] for one in answer["predictions"]} == {"cat", "dog"}


def test_paths_and_classes_are_not_broken_into_pieces(app, trained, tmp_path, monkeypatch):
    run, files, _ = trained
    monkeypatch.setenv("COLUMNS", "40")
    long = tmp_path / ("a" * 60) / "digit [red].png"
    long.parent.mkdir()
    shutil.copy(files[0], long)
    first, second, third, *rest = app("predict", run, long, files[0], "--top", "2").splitlines()
    assert (first, third) == (str(long), str(files[0]))
    assert re.fullmatch(r"    \d \d+\.\d\d %   \d \d+\.\d\d %", second) and rest == [second]


@pytest.fixture
def broken(trained, tmp_path):
    """Files that `predict` refuses, by name; those that are as they should be, too."""
    run, files, _ = trained
    (tmp_path / "text.png").write_text("no image")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    good = load_file(run / "best.safetensors")
    save_file(good, tmp_path / "tampered.safetensors", {"recipe": "name: [", "classes": '["a"]'})
    save_file(good, tmp_path / "good.safetensors", safe_open(run / "best.safetensors", "pt").metadata())
    shutil.copy(files[0], tmp_path / "good.png")
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "recipe.yaml", tmp_path / "begun")
    (tmp_path / "empty").mkdir()
    return tmp_path


PREDICT = {
    "missing image": (("good.safetensors", "nowhere.png"), "nowhere.png: cannot read the image: No such file"),
    "text as image": (("good.safetensors", "text.png"), "text.png: cannot read the image: cannot identify"),
    "folder without images": (("good.safetensors", "empty"), "empty: there are no images in this folder (.jpg, "),
    "pattern of none": (("good.safetensors", "*.tiff"), "*.tiff: no file has a name like this"),
    "no part": (("good.safetensors", "good.png", "--shard", "0/2"), "--shard 0/2: use I/N, such as 1/8"),
    "no table": (("good.safetensors", "good.png", "--out", "x.txt"), "--out x.txt: use a name that ends in .jsonl or"),
    "nowhere to write": (("good.safetensors", "good.png", "--out", "x/y.csv"), "--out x/y.csv: there is no folder"),
    "nothing to continue": (("good.safetensors", "good.png", "--resume"), "--resume continues the file of --out; name"),
    "no class": (("good.safetensors", "good.png", "--top", "0"), "Must be >= 1"),
    "no image": (("good.safetensors",), "IMAGE"),
    "missing weights": (
        ("nowhere.safetensors", "good.png"),
        "nowhere.safetensors: cannot read the weights: there is no",
    ),
    "begun run": (("begun", "good.png"), "begun: this run has no best.safetensors yet"),
    "empty folder": (("empty", "good.png"), "empty/best.safetensors: cannot read the weights: there is no such file"),
    "foreign weights": (("foreign.safetensors", "good.png"), "not the weights of a run"),
    "tampered weights": (("tampered.safetensors", "good.png"), "tampered.safetensors:1: not valid YAML"),
    "recipe as weights": ((QUICKSTART, "good.png"), "not the weights of a run"),
    "authors' weights": ((DATA / "tiny_dydensenet.pth.tar", "good.png"), "not the weights of a run"),
}


@pytest.mark.parametrize("arguments, message", PREDICT.values(), ids=PREDICT)
def test_mistakes_in_predict(app, broken, arguments, message):
    text = app("predict", *arguments, cwd=broken, expect=2)
    assert text.startswith("error: ") and text.count("\n") == 1 and message in text, text


def metadata_is_whole(metadata):
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["preprocessing"]) == {
        "channels": 1, "height": 8, "width": 8, "scale": 1 / 255, "mean": [0.3054], "std": [0.3760],
    }  # fmt: skip


def test_export_for_pytorch(app, trained, tmp_path):
    run, _, learn = trained
    app("export", run / "best.safetensors", tmp_path / "net.pt2")
    extra = {"classes": "", "preprocessing": ""}
    network = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    metadata_is_whole(extra)
    expected = Predictor.from_weights(run / "best.safetensors").model
    images = torch.cat([x for x, _ in learn.dls.valid]).as_subclass(torch.Tensor)
    for batch in (images, images[:1]):
        with torch.no_grad():
            torch.testing.assert_close(network(batch), expected(batch), rtol=1e-4, atol=1e-4)


def test_export_for_onnx(app, trained, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    run, _, learn = trained
    app("export", run / "best.safetensors", tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    metadata_is_whole(session.get_modelmeta().custom_metadata_map)
    expected = Predictor.from_weights(run / "best.safetensors").model
    images = torch.cat([x for x, _ in learn.dls.valid]).as_subclass(torch.Tensor)
    for batch in (images, images[:1]):
        (found,) = session.run(["logits"], {"images": batch.numpy()})
        with torch.no_grad():
            # Gates a rounding apart may choose another channel, in one image of many.
            close = torch.isclose(torch.from_numpy(found), expected(batch), rtol=1e-3, atol=1e-3).all(1)
        assert close.float().mean() > 0.98


def test_what_cannot_be_exported_leaves_nothing(app, trained, tmp_path, monkeypatch):
    run, *_ = trained
    weights = run / "best.safetensors"
    assert "export writes .pt2 and .onnx, not .txt" in app("export", weights, tmp_path / "net.txt", expect=2)
    assert "there is no folder" in app("export", weights, tmp_path / "nowhere/net.pt2", expect=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert "try pip install onnx onnxscript onnxruntime" in app("export", weights, tmp_path / "net.onnx", expect=2)
    # An export that computes something else is found out.
    from dgc_fastai.inference import export as module

    monkeypatch.setattr(
        module, "_torch_export", lambda predictor, model, images: (b"", lambda batch: model(batch) * 1.01)
    )
    assert "not written: its outputs differ" in app("export", weights, tmp_path / "net.pt2", expect=2)
    monkeypatch.setattr(
        module, "_torch_export", lambda predictor, model, images: (b"", lambda batch: model(batch) * torch.nan)
    )
    assert "not written: its outputs differ" in app("export", weights, tmp_path / "net.pt2", expect=2)
    assert not list(tmp_path.iterdir())
