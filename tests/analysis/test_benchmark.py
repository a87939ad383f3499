"""The benchmark from the command line: its table and files, mistakes, interruptions."""

import json
import os

import pytest
import torch
from PIL import Image
from rich.console import Console

from dgc_fastai.analysis import benchmark
from dgc_fastai.analysis.benchmark import speedup
from dgc_fastai.analysis.benchmark_plan import plan_benchmark
from dgc_fastai.analysis.timing import summarize
from dgc_fastai.utils import timing
from helpers import QUICKSTART
from helpers.benchmarks import INFERENCE, TINY, TRAINING, tiny
from helpers.command_line import only


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SECONDS", 1e-3)


def test_a_benchmark_leaves_a_table_and_two_files(app, tmp_path):
    text = app("benchmark", QUICKSTART, *TINY, "model.arch=dgc_densenet22_sgc", f"output={tmp_path}", "--rounds", "2")
    folder = only(tmp_path)
    assert folder.name.startswith("benchmark-quickstart-2")
    assert f"benchmark.json and benchmark.png are in {folder}." in text.replace("\n", " ")
    assert sorted(os.listdir(folder)) == ["benchmark.json", "benchmark.png"]
    report = json.loads((folder / "benchmark.json").read_text())
    what = [(one["what"], one["batch"]) for one in report["measurements"]]
    assert what == [("training step", 4), ("inference", 1), ("inference", 4)]
    for measurement, names in zip(report["measurements"], [TRAINING, INFERENCE, INFERENCE]):
        rows = measurement["variants"]
        assert [row["name"] for row in rows] == names
        for row in rows:
            assert len(row["ms"]) == 2 and min(row["ms"]) > 0
            assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
            assert (row["peak_bytes"] is None) == (measurement["what"] == "inference")
        assert rows[0]["ratio"] == {"median": 1, "min": 1, "max": 1}
    for found in (measurement["speedup"] for measurement in report["measurements"][1:]):
        assert found["of"].startswith("deployed") and found["over"].startswith("dense") and found["median"] > 0
    assert " ".join(text.split()).count("the fastest dense form") == 2
    peaks = {row["name"]: row["peak_bytes"] for row in report["measurements"][0]["variants"]}
    assert peaks["dense"] == peaks["dense again"] > 0 and peaks["reference at 1"] > peaks["dense"]
    assert report["recipe"]["model"]["arch"] == "dgc_densenet22_sgc" and report["rounds"] == 2
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["device"] == "cpu"
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.size[0] > 800
    for name in {*TRAINING, *INFERENCE}:
        assert name in text
    assert "Noise, the dense baseline against itself: " in text and max(map(len, text.splitlines()[:-1])) <= 80


@pytest.mark.parametrize("only, count", [("training", 1), ("inference", 2)])
def test_one_half_of_it(app, tmp_path, only, count):
    app("benchmark", QUICKSTART, *TINY, f"--out={tmp_path}", "--rounds=1", "--no-compile", f"--only={only}")
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert [one["what"].split()[0] for one in report["measurements"]] == [only] * count
    assert "wrong" in app("benchmark", QUICKSTART, "--only=wrong", expect=2)


def test_the_fastest_of_each_are_compared():
    times = {"dense": [9, 9, 9], "ours at 1": [1, 1, 1], "dense compiled": [6, 8, 7], "deployed": [4, 2, 7]}
    found = speedup(summarize(times | {"deployed compiled": [5, 5, 5], "dense again": [9, 9, 9]}, {}))
    assert found == {"speedup": {"of": "deployed", "over": "dense compiled", "median": 1.5, "min": 1, "max": 4}}
    assert speedup(summarize({"dense": [1.0]}, {})) == {}


def test_what_is_measured_before_an_interrupt_is_kept(monkeypatch, tmp_path):

    recipe = tiny()
    for after, left in ((0, []), (2, ["out", "out/benchmark.json"])):
        plan = plan_benchmark(recipe, compiled=False)[::-1]  # inference is the quicker

        def interrupt():
            raise KeyboardInterrupt

        plan[after] = plan[after]._replace(variants=[plan[after].variants[0]._replace(call=interrupt)])
        folder = benchmark.benchmark_folder(recipe, tmp_path / "out")
        with pytest.raises(KeyboardInterrupt):
            benchmark.benchmark(recipe, plan, folder, 1, Console(quiet=True))
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left
    assert len(json.loads((folder / "benchmark.json").read_text())["measurements"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(["--rounds", "0"], "Must be >= 1", id="no rounds"),
        pytest.param(
            ["--out", "file/below"],
            "--out: cannot make the folder file/below: Not a directory",
            id="--out below a file",
        ),
        pytest.param(["--out", "file"], "--out: cannot make the folder file: File exists", id="--out is a file"),
        pytest.param(
            ["output=file"], "output: cannot make the folder file/benchmark-quickstart-", id="output is a file"
        ),
        pytest.param(["model.heads=3"], "model: heads=3 does not divide", id="heads"),
        pytest.param(
            ["train.optimizer=sdg"], "train.optimizer: timm has no 'sdg'; did you mean 'sgd'?", id="optimizer"
        ),
        pytest.param(["train.precision=fp16"], "train.precision: fp16 needs a CUDA device", id="fp16 without CUDA"),
        pytest.param(
            ["train.compile=true"],
            "train.compile: torch.compile needs a C++ compiler, and there is no no-compiler",
            id="compiled training without a compiler",
        ),
        pytest.param(
            [],
            "--compile: torch.compile needs a C++ compiler, and there is no no-compiler",
            id="compiled inference without a compiler",
        ),
        pytest.param(["train.epoch=3"], "did you mean 'train.epochs'", id="misspelt key"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(app, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "file").touch()
    if not arguments or "train.compile=true" in arguments:
        monkeypatch.setenv("CXX", "no-compiler")
    text = app("benchmark", QUICKSTART, *TINY, *arguments, cwd=tmp_path, expect=2)
    assert text.startswith("error: ") and text.count("\n") == 1 and message in text, text
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_of_somebody_else_s_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match="--out: .* is not writable; choose another folder"):
        benchmark.benchmark_folder(tiny(), tmp_path)
