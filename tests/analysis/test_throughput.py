"""Images per second of the data pipeline, and what limits training."""

import json

import pytest
import torch
from PIL import Image

from dgc_fastai.analysis import throughput
from dgc_fastai.analysis.benchmark_text import bottleneck_sentence
from dgc_fastai.analysis.throughput import loader_name, worker_counts
from dgc_fastai.data.loaders import build_dataloaders
from helpers import QUICKSTART
from helpers.benchmarks import TINY, tiny
from helpers.datasets import write_imagenet

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_data_pipeline_by_itself(app, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(throughput, "MIN_SECONDS", 0.0)
    write_imagenet(tmp_path / "data", train=3)
    path = "data.name=folder", f"data.path={tmp_path}/data", "data.size=16", f"data.workers={workers}"
    out = tmp_path / "out"
    text = app("benchmark", QUICKSTART, *TINY, *path, f"--out={out}", "--rounds=2", "--only=data")
    report = json.loads((out / "benchmark.json").read_text())
    assert report["measurements"] == [] and report["rounds"] == 2
    data, loaders = report["data"], [loader_name(count) for count in worker_counts(workers)]
    assert {"loader, 0 workers", f"loader, {workers} worker{'s' * (workers > 1)}"} <= set(loaders)
    steps = [f"training step, {name}" for name in ("dense", "ours at 0.5")]
    parts = ["decode, one thread", "decode and augment, one thread"]
    assert [row["name"] for row in data["sources"]] == [*steps, *parts, *loaders]
    for row in data["sources"]:
        assert len(row["rates"]) == 2 and 0 < row["min"] <= row["median"] <= row["max"] and row["name"] in text
    rates = {row["name"]: row["median"] for row in data["sources"]}
    assert (data["workers"], data["batch"]) == (workers, 4)
    assert data["taken"] == rates[steps[1]] and data["given"] == rates[loader_name(workers)]
    assert data["limit"] == ("data" if data["given"] < data["taken"] else "network")
    assert "images/s, the loader gives" in " ".join(text.split())
    with Image.open(out / "benchmark.png") as picture:
        assert picture.size[0] > 800


def test_the_data_pipeline_of_a_small_set_and_of_none(app, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "MIN_SECONDS", 0.0)
    app("benchmark", QUICKSTART, *TINY, "data.workers=2", f"--out={tmp_path}", "--rounds=1", "--only=data")
    data = json.loads((tmp_path / "benchmark.json").read_text())["data"]
    assert [row["name"] for row in data["sources"]][2:] == ["loader, 0 workers"] and data["workers"] == 0
    text = app("benchmark", QUICKSTART, "data.name=folder", "data.path=nowhere", "--only=data", expect=2)
    assert text.startswith("error: data.path: there is no folder nowhere")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_image_read_while_the_timer_runs_is_counted(tmp_path, monkeypatch, workers):
    write_imagenet(tmp_path, train=4)
    (tmp_path / "train/n01/n01_0.JPEG").write_bytes(b"")
    recipe = tiny("data.name=folder", f"data.path={tmp_path}", "data.size=16", "data.unreadable=skip")

    def count(batch_size):
        waits = []
        data = recipe.data.model_copy(update={"batch_size": batch_size, "workers": workers})
        train = build_dataloaders(data, CPU).train
        images, seconds = throughput.read_loader(train, lambda: waits.append(1))
        assert 0 < seconds < 60
        return images, len(waits)

    monkeypatch.setattr(throughput, "MIN_SECONDS", 60.0)
    assert count(6) == (11, 2)  # too few batches to leave some out
    (tmp_path / "train/n01/n01_0.JPEG").unlink()
    assert count(1) == (11 - workers, 11)  # but for the first of each worker
    monkeypatch.setattr(throughput, "MIN_SECONDS", 0.0)
    assert count(1) == (1 + 2 * workers, 1 + 3 * workers)
    (tmp_path / "train/n01/n01_0.JPEG").write_bytes(b"")
    decode, augment, *_ = throughput.pipeline_sources(recipe, CPU, lambda: None)
    assert decode.run()[0] == augment.run()[0] == 11


def test_rates_are_taken_in_turn_after_a_round_that_warms_up():
    order, seconds = [], iter([9, 9, 1, 2, 4, 5])

    def source(name, images):
        return throughput.Source(name, lambda: order.append(name) or (images, next(seconds)))

    first, second = throughput.measure_rates([source("a", 10), source("b", 20)], 2, lambda name: None)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert first == {"name": "a", "median": 3.75, "min": 2.5, "max": 5, "rates": [5, 2.5]}
    assert second["rates"] == [20, 4]


@pytest.mark.parametrize(
    "given, limit, enough, words",
    [
        ([5, 8, 30], "data", 2, "8 with 1 worker: the data limits training; 2 would be enough."),
        ([5, 8, 9], "data", None, "8 with 1 worker: the data limits training."),
        ([5, 20, 9], "network", None, "20 with 1 worker: the data does not limit training."),
    ],
    ids=["more workers would do", "workers alone would not do", "the network limits"],
)
def test_what_limits_training(monkeypatch, given, limit, enough, words):
    monkeypatch.setattr(throughput, "worker_counts", lambda own: [0, 1, 2])
    rows = [{"name": loader_name(count), "median": rate} for count, rate in enumerate(given)]
    found = throughput.find_bottleneck([{"name": "net", "median": 10}, *rows], "net", 1)
    assert found["limit"] == limit and (limit == "network" or found["enough"] == enough)
    sentence = bottleneck_sentence(found | {"workers": 1})
    assert sentence == f"The network can train on 10 images/s, the loader gives {words}"
