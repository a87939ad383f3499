"""predict for many images: folders, lists, files that are continued, parts, unreadable images."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dgc_fastai import load_recipe, save_checkpoint
from dgc_fastai.models.factory import build_model
from helpers import QUICKSTART, ROOT
from helpers.runs import SMALL

COUNT = 41


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Weights of a run that nobody has trained, and a folder of images of which two are none."""
    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    recipe = load_recipe(QUICKSTART, [*SMALL])
    model = build_model(recipe.model, 10, (1, 8, 8))
    torch.nn.init.normal_(model.get_classifier().weight)
    metadata = {"recipe": recipe.to_yaml(), "classes": json.dumps([str(digit) for digit in range(10)])}
    save_checkpoint(model, folder / "w.safetensors", metadata)
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / "images" / ("more" if number % 3 else ".") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + number % 3, 8), dtype=np.uint8)).save(path)
    (folder / "images/07 text.png").write_text("no image")
    (folder / "images/more/half.png").write_bytes((folder / "images/more/01.png").read_bytes()[:60])
    return folder


def records(text):
    return {one["image"]: one.get("predictions") for one in map(json.loads, text.splitlines())}


@pytest.fixture
def predict(app, pictures):
    def call(*arguments, weights="w.safetensors", **keywords):
        return app("predict", weights, *arguments, cwd=pictures, **keywords)

    return call


@pytest.fixture
def expected(predict):
    return records(predict("images", "--json"))


def test_a_folder_with_images_that_cannot_be_read(predict, expected, tmp_path, capsys):
    assert len(expected) == COUNT + 2
    assert [name for name, found in expected.items() if not found] == ["images/07 text.png", "images/more/half.png"]
    assert all(len(found) == 3 for found in expected.values() if found)
    for out, workers in (("x.jsonl", "2"), ("y.jsonl", "0")):
        predict("images", "--out", tmp_path / out, "--workers", workers, "--batch-size", "7")
        found = records((tmp_path / out).read_text())
        assert list(found) == list(expected)
        for name, classes in expected.items():
            shares = {one["class"]: one["probability"] for one in classes or ()}
            assert {one["class"]: one["probability"] for one in found[name] or ()} == pytest.approx(shares, abs=2e-6)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert next(one["error"] for one in lines if "error" in one).startswith("cannot read the image: cannot identify")


def test_warnings_name_them_and_the_rest_goes_on(pictures):
    command = [sys.executable, ROOT / "app.py", "predict", "w.safetensors", "images", "--top", "1"]
    done = subprocess.run(command, cwd=pictures, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(" %") == COUNT
    first, second = done.stderr.splitlines()
    assert first == "warning: images/07 text.png: cannot read the image: cannot identify image file"
    assert second.startswith("warning: images/more/half.png: cannot read the image: ")


def test_json_on_a_terminal_that_is_not_utf8(pictures, tmp_path):
    os.link(pictures / "images/00.png", tmp_path / "ü.png")
    command = [sys.executable, ROOT / "app.py", "predict", pictures / "w.safetensors", "ü.png", "--json"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, check=True)
    assert json.loads(done.stdout.decode("ascii"))["image"] == "ü.png"


def test_none_that_can_be_read(predict, tmp_path):
    answer = predict("images/07 text.png", "images/more/half.png", expect=2)
    assert answer.endswith("error: none of the 2 images can be classified\n") and answer.count("warning: ") == 2
    out = "--out", tmp_path / "x.csv"
    answer = predict("images/07 text.png", "images/more/half.png", *out, expect=2)
    assert answer.endswith("error: none of the images can be classified\n")
    assert "2 were there already" in predict("images/07 text.png", "images/more/half.png", *out, "--resume")
    assert predict("images/07 text.png", expect=2).startswith(
        "error: images/07 text.png: cannot read the image: cannot"
    )


def test_a_network_that_overflows(predict, pictures, tmp_path):
    """NaN is no probability, and no JSON."""
    state, metadata = load_file(pictures / "w.safetensors"), safe_open(pictures / "w.safetensors", "pt").metadata()
    save_file({**state, "classifier.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.safetensors", metadata)
    answer = predict("images/00.png", weights=tmp_path / "nan.safetensors", expect=2)
    assert answer == "error: images/00.png: the network's output is NaN or Inf\n"


def test_a_pattern_and_a_list(predict, expected, monkeypatch):
    assert list(records(predict("images/*.png", "--json"))) == [name for name in expected if "more" not in name]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"images/more/02.png\nimages/gone.png\n")))
    assert records(predict("-", "--json")) == {
        "images/more/02.png": expected["images/more/02.png"], "images/gone.png": None,
    }  # fmt: skip


def test_parts_are_the_whole(predict, expected, tmp_path):
    for number in range(1, 4):
        text = predict("images", "--shard", f"{number}/3", "--out", tmp_path / f"{number}.csv", "--top", "1")
        assert f" of {COUNT + 2} images to " in text
    found = {}
    for path in tmp_path.glob("*.csv"):
        with open(path, newline="") as file:
            rows = {row["image"]: row["class_1"] for row in csv.DictReader(file)}
        assert 5 < len(rows) < 25 and not rows.keys() & found.keys()
        found |= rows
    assert found == {name: classes[0]["class"] if classes else "" for name, classes in expected.items()}


def test_mirror_images_are_averaged(predict, pictures, tmp_path):
    name = "images/more/04.png"
    Image.open(pictures / name).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirror.png")

    def shares(*arguments):
        (found,) = records(predict(*arguments, "--json", "--top", "20")).values()
        return np.array([one["probability"] for one in sorted(found, key=lambda one: one["class"])])

    plain, mirror, both = shares(name), shares(tmp_path / "mirror.png"), shares(name, "--flip")
    assert len(both) == 10 and abs(plain - mirror).max() > 0.01
    np.testing.assert_allclose(both, (plain + mirror) / 2, atol=1e-5)


def test_a_killed_process_goes_on(predict, pictures, expected, tmp_path):
    """Killed while it writes: no line lost, none twice."""
    out = tmp_path / "x.jsonl"
    images = tmp_path / "many"
    images.mkdir()
    for number in range(600):
        os.link(pictures / f"images/more/{[1, 2, 4, 5][number % 4]:02d}.png", images / f"{number:03d}.png")
    command = [sys.executable, ROOT / "app.py", "predict", "w.safetensors", images, "--out", out, "--batch-size", "4"]
    process = subprocess.Popen(command, cwd=pictures, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out.exists() and out.stat().st_size > 2000) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes().count(b"\n")
    assert 0 < before < 600
    out.write_bytes(out.read_bytes()[:-9])  # as after a crash of the system
    text = predict(images, "--out", out, "--resume")
    assert f"{before - 1:,} were there already" in text or f"{before:,} were there already" in text
    names = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    assert sorted(names) == sorted(str(path) for path in images.iterdir())
    assert "600 were there already" in predict(images, "--out", out, "--resume")
