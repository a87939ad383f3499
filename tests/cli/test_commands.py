"""The commands beside training: list, copy, predict, export, compare, sweep; and how a run is stopped."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from safetensors.torch import load_file, save_file

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.inference.predict import Predictor
from dgc_fastai.training.sweep import combinations, draw_sweep
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


def test_list_tells_what_each_recipe_reproduces(app, tmp_path):  # noqa: F811
    text = " ".join(app("list").split())
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{path.name}" in text
    assert "DenseNet-86 with DGC on CIFAR-10 (Su, Fang et al., ECCV 2020)" in text
    assert "Reproduces the published test error: top-1 4.77 %, at gate factor 0.25." in text
    # A field that goes on in a second line.
    assert "top-1 31.22 %, top-5 11.38 %, at gate factor 0.45." in text
    assert "error: " in app("list", tmp_path, expect=2)


def test_a_copy_is_a_recipe_of_one_s_own(app, tmp_path):  # noqa: F811
    app("copy", QUICKSTART, cwd=tmp_path)
    copy = tmp_path / "my_quickstart.yaml"
    original, mine = load_recipe(QUICKSTART), load_recipe(copy)
    assert mine == original.model_copy(update={"name": "my_quickstart"})
    assert "python app.py my_quickstart.yaml" in copy.read_text() and "recipes/quickstart" not in copy.read_text()
    before = copy.read_text()
    assert "there is a file of that name already" in app("copy", QUICKSTART, cwd=tmp_path, expect=2)
    assert copy.read_text() == before
    for name in ("42.yaml", "true.yaml", "-x y.yaml"):
        app("copy", QUICKSTART, f"./{name}", cwd=tmp_path)
        load_recipe(tmp_path / name)
    for name, message in (("x.txt", "ends in .yaml"), ("nowhere/x.yaml", "cannot write nowhere/x.yaml: No such file")):
        assert message in app("copy", QUICKSTART, name, cwd=tmp_path, expect=2)
    assert "cannot read the recipe" in app("copy", "nothing.yaml", cwd=tmp_path, expect=2)
    (tmp_path / "link.yaml").symlink_to("nowhere.yaml")
    assert "there is a file of that name already" in app("copy", QUICKSTART, "link.yaml", cwd=tmp_path, expect=2)


def test_predictions_are_the_network_s(app, trained):  # noqa: F811
    run, files, learn = trained
    weights = run / "best.safetensors"
    answers = json.loads(app("predict", weights, *files, "--json", "--top", "10"))
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


def test_predictions_for_a_folder_of_one_s_own(app, tmp_path):  # noqa: F811
    write_imagenet(tmp_path / "pets", classes=("cat", "dog"))
    recipe = "data.name=folder", f"data.path={tmp_path}/pets", "data.size=16", f"output={tmp_path}/runs"
    app(QUICKSTART, *SHORT, *recipe)
    weights = only(tmp_path / "runs") / "last.safetensors"
    moved = shutil.move(tmp_path / "pets", tmp_path / "elsewhere")  # the weights are enough
    (answer,) = json.loads(app("predict", weights, f"{moved}/val/dog/dog_0.JPEG", "--json"))
    assert {one["class"] for one in answer["predictions"]} == {"cat", "dog"}


def test_mistakes_in_predict(app, trained, tmp_path):  # noqa: F811
    run, files, _ = trained
    weights = run / "best.safetensors"
    (tmp_path / "text.png").write_text("no image")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    tampered = tmp_path / "tampered.safetensors"
    save_file(load_file(weights), tampered, {"recipe": "name: [", "classes": '["a"]'})
    for arguments, message in [
        ((weights, "nowhere.png"), "nowhere.png: cannot read the image: No such file"),
        ((weights, tmp_path / "text.png"), "text.png: cannot read the image: cannot identify"),
        ((weights, files[0], "--top", "0"), "Must be >= 1"),
        ((weights,), "IMAGE"),
        (("nowhere.safetensors", files[0]), "nowhere.safetensors: cannot tell its network: no such file"),
        ((tmp_path / "foreign.safetensors", files[0]), "not the weights of a run"),
        ((tampered, files[0]), "tampered.safetensors:1: not valid YAML"),
        ((QUICKSTART, files[0]), "not the weights of a run"),
        ((DATA / "tiny_dydensenet.pth.tar", files[0]), "not the weights of a run"),
    ]:
        text = app("predict", *arguments, cwd=tmp_path, expect=2)
        assert text.startswith("error: ") and text.count("\n") == 1 and message in text, text


def metadata_is_whole(metadata):
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["preprocessing"]) == {
        "channels": 1, "height": 8, "width": 8, "scale": 1 / 255, "mean": [0.3054], "std": [0.3760],
    }  # fmt: skip


def test_export_for_pytorch(app, trained, tmp_path):  # noqa: F811
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


def test_export_for_onnx(app, trained, tmp_path):  # noqa: F811
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


def test_what_cannot_be_exported_leaves_nothing(app, trained, tmp_path, monkeypatch):  # noqa: F811
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


def test_a_sweep_trains_every_combination_and_compares_them(app, tmp_path):  # noqa: F811
    text = app(
        "sweep", QUICKSTART, *SHORT[1:], "model.stages=[1,1,1]", "model.gate_factor=0.25,1", "train.seed=0,1",
        f"output={tmp_path}",
    )  # fmt: skip
    assert "Run 4 of 4: gate_factor=1 seed=1" in text and "top-1" in text
    folder = only(tmp_path)
    rows = list(csv.DictReader(open(folder / "sweep.csv")))
    labels = [f"gate_factor={factor} seed={seed}" for factor in ("0.25", "1") for seed in (0, 1)]
    assert [row["label"] for row in rows] == labels
    assert Image.open(folder / "sweep.png").size[0] > 800
    for row in rows:
        run = folder / row["run"]
        recipe = load_recipe(run / "recipe.yaml")
        assert f"gate_factor={recipe.model.gate_factor:g} seed={recipe.train.seed}" == row["label"]
        assert recipe.output == str(folder)
        history = list(csv.DictReader(open(run / "history.csv")))
        most = max(float(one["inactive"]) for one in history)
        assert float(row["top_1"]) == max(float(one["top_1"]) for one in history if float(one["inactive"]) == most)
    assert int(rows[0]["macs"]) < int(rows[2]["macs"]) and rows[0]["macs_dense"] == rows[2]["macs_dense"]
    text = app("compare", *(folder / row["run"] for row in rows))
    lines = [line.split() for line in text.splitlines() if "2/2" in line]
    best = sorted((float(row["top_1"]) for row in rows), reverse=True)
    assert [float(line[3]) for line in lines] == pytest.approx([100 * top_1 for top_1 in best], abs=0.01)
    assert "gate_" in text and "seed" in text and "heads" not in text and all(row["run"] in text for row in rows)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.gate_factor=0.5"], "a sweep needs a key with several values"),
        (
            ["model.gate_factor=0.5,2"],
            "model.gate_factor=2: model.gate_factor: input should be less than or equal to 1",
        ),
        (["model.heads=2,3"], "model: heads=3 does not divide"),
        (["model.head=2,4"], "did you mean 'heads'"),
    ],
)
def test_a_sweep_tries_every_combination_before_it_begins(app, tmp_path, overrides, message):  # noqa: F811
    assert message in app("sweep", QUICKSTART, *overrides, f"output={tmp_path}/runs", expect=2)
    assert not list(tmp_path.iterdir())


def test_combinations_keep_lists_whole():
    assert combinations(["a.b=1,2", "c=[1,2],[3]", "d=x=y"]) == [
        ["a.b=1", "c=[1,2]", "d=x=y"], ["a.b=1", "c=[3]", "d=x=y"],
        ["a.b=2", "c=[1,2]", "d=x=y"], ["a.b=2", "c=[3]", "d=x=y"],
    ]  # fmt: skip
    assert combinations(["a={x: 1, y: 2}"]) == [["a={x: 1, y: 2}"]] and combinations([]) == [[]]


def test_the_picture_of_a_sweep_takes_any_number_of_runs():
    for count in (1, 30):
        rows = [dict(label=str(n), macs=n * 1e6, macs_dense=2e6, top_1=n / 30) for n in range(count)]
        assert draw_sweep(rows, "many").startswith(b"\x89PNG")


def test_what_is_no_run_cannot_be_compared(app, tmp_path):  # noqa: F811
    assert "not the folder of a run" in app("compare", tmp_path, expect=2)
    (tmp_path / "summary.json").write_text("{")
    assert "cannot read the run" in app("compare", tmp_path, expect=2)


# Stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_the_run_and_resume_goes_on_with_it(app, tmp_path, number, code):  # noqa: F811
    overrides = [*TINY, "train.epochs=20", "output=runs"]
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
    assert f"to go on: python app.py {Path('runs') / folder.name / 'recipe.yaml'} --resume" in errors
    text = app(Path("runs") / folder.name / "recipe.yaml", "--resume", cwd=tmp_path)
    assert f"Going on with runs/{folder.name}." in text and f"The run is in runs/{folder.name}." in text
    history = list(csv.DictReader(open(folder / "history.csv")))
    assert [int(row["epoch"]) for row in history] == list(range(1, 21))
    assert not (folder / "state.pt").exists()


def test_resume_starts_a_run_where_there_is_none(app, tmp_path):  # noqa: F811
    text = app(QUICKSTART, *SHORT, f"output={tmp_path}", "--resume")
    assert f"No interrupted run of this recipe below {tmp_path}: starting one." in text
    assert (only(tmp_path) / "last.safetensors").exists()


# Logging ----------------------------------------------------------------------------------------------------


def test_tensorboard(app, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    app(QUICKSTART, *SHORT, f"output={tmp_path}", "log.loggers=[tensorboard]")
    run = only(tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    history = list(csv.DictReader(open(run / "history.csv")))
    logged = [event.value for event in events.Scalars("top_1")]
    assert logged == pytest.approx([float(row["top_1"]) for row in history])
    assert {"train_loss", "valid_loss", "inactive", "lasso"} <= set(events.Tags()["scalars"])
    # Logging changes nothing.
    app(QUICKSTART, *SHORT, f"output={tmp_path}/plain")
    plain = list(csv.DictReader(open(only(tmp_path / "plain") / "history.csv")))
    assert [row["valid_loss"] for row in plain] == [row["valid_loss"] for row in history]


def test_trackio_and_wandb_get_the_rows(app, tmp_path, monkeypatch):  # noqa: F811
    """Against stand-ins for the services: what is called, and with what."""
    calls = []

    class Service:
        __spec__ = object()
        run = None

        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    class WandbCallback(Callback):
        def __init__(self, log_preds):
            assert not log_preds  # pictures of predictions would run the network once more

        def before_fit(self):
            assert self.learn.gather_args() == {}

        def after_fit(self):
            assert getattr(self.learn, "gather_args", None) is not dict

        def after_epoch(self):
            calls.append(("row", (), dict(zip(self.recorder.metric_names, self.recorder.log))))

    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, Service())
    module = type(sys)("fastai.callback.wandb")
    module.WandbCallback = WandbCallback
    monkeypatch.setitem(sys.modules, "fastai.callback.wandb", module)
    app(QUICKSTART, *SHORT, f"output={tmp_path}", "log.loggers=[trackio, wandb]")
    run = only(tmp_path)
    begun = [kwargs for name, _, kwargs in calls if name == "init"]
    assert [one["name"] for one in begun] == [run.name] * 2 and begun[0]["config"]["train"]["epochs"] == 2
    rows = [args[0] for name, args, _ in calls if name == "log"]
    history = list(csv.DictReader(open(run / "history.csv")))
    assert [row["valid_loss"] for row in rows] == pytest.approx([float(row["valid_loss"]) for row in history])
    assert len([1 for name, *_ in calls if name == "row"]) == 2
    assert len([1 for name, *_ in calls if name == "finish"]) == 2


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_services_themselves(app, tmp_path, monkeypatch, name):  # noqa: F811
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    app(QUICKSTART, *SHORT, f"output={tmp_path}/runs", f"log.loggers=[{name}]")
    assert list(tmp_path.rglob("*.wandb") if name == "wandb" else (tmp_path / "trackio").rglob("*"))


def test_a_logger_that_is_not_there_is_told_how_to_get(app, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = app(QUICKSTART, "log.loggers=[wandb]", f"output={tmp_path}/runs", expect=2)
    assert "log.loggers: wandb is not installed; try pip install wandb" in text
    assert not os.listdir(tmp_path)
