"""Loggers: tensorboard, trackio, wandb."""

import csv
import os
import sys

import pytest
from fastai.callback.core import Callback
from safetensors.torch import load_file

from dgc_fastai.inference.predict import Predictor
from helpers import QUICKSTART
from helpers.command_line import only
from helpers.golden import equal_states
from helpers.runs import TINY

SHORT = [*TINY, "train.epochs=2"]


def test_tensorboard(app, tmp_path):
    pytest.importorskip("tensorboard")
    app(QUICKSTART, *SHORT, f"output={tmp_path}", "log.loggers=[tensorboard]")
    run = only(tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    history = list(csv.DictReader(open(run / "history.csv")))
    logged = [event.value for event in events.Scalars("top_1")]
    assert logged == pytest.approx([float(row["top_1"]) for row in history])
    assert {"train_loss", "valid_loss", "inactive", "gate_penalty"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("gates/usage_entropy")) == len(events.Images("gates")) == len(history) == 2
    network = Predictor.from_weights(run / "last.safetensors").model
    for name, _ in network.named_modules():
        if name.endswith("conv1"):
            assert 0 <= events.Scalars(f"gates_by_layer/class_share/{name}")[-1].value <= 1
    # Logging changes nothing.
    app(QUICKSTART, *SHORT, f"output={tmp_path}/plain")
    plain = only(tmp_path / "plain")
    rows = list(csv.DictReader(open(plain / "history.csv")))
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in history]
    assert equal_states(load_file(plain / "last.safetensors"), load_file(run / "last.safetensors"))


def test_trackio_and_wandb_get_the_rows(app, tmp_path, monkeypatch):
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

        _wandb_step = 7

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
    by_trackio, by_wandb = ([row for row in rows if ("valid_loss" in row) == is_row] for is_row in (True, False))
    assert [row["valid_loss"] for row in by_trackio] == pytest.approx([float(row["valid_loss"]) for row in history])
    for logged in (by_trackio, by_wandb):
        assert len(logged) == 2 and all(0 <= row["gates/usage_entropy"] <= 1 and "gates" in row for row in logged)
    pictures = [args[0] for name, args, _ in calls if name == "Image"]
    assert len(pictures) == 4 and all(one.shape[2] == 3 and one.dtype == "uint8" for one in pictures)
    assert len([1 for name, *_ in calls if name == "row"]) == 2
    assert len([1 for name, *_ in calls if name == "finish"]) == 2


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_services_themselves(app, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    app(QUICKSTART, *SHORT, f"output={tmp_path}/runs", f"log.loggers=[{name}]")
    assert list(tmp_path.rglob("*.wandb") if name == "wandb" else (tmp_path / "trackio").rglob("*"))


def test_a_logger_that_is_not_there_is_told_how_to_get(app, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = app(QUICKSTART, "log.loggers=[wandb]", f"output={tmp_path}/runs", expect=2)
    assert "log.loggers: wandb is not installed; try pip install wandb" in text
    assert not os.listdir(tmp_path)
