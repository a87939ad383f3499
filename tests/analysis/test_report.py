"""report: what it reads of run folders, measures, and writes; the page in a browser is in test_report_browser.py."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from dgc_fastai.analysis.report import evaluation as evaluation_module
from dgc_fastai.analysis.report import latency, measure
from dgc_fastai.analysis.report.build import page_data, write_report
from dgc_fastai.analysis.report.collect import StoredRun, find_runs, read_stored_run, unstarted_runs
from dgc_fastai.analysis.report.evaluation import TooLong, ValidationImages
from dgc_fastai.analysis.report.groups import common_differences, group_runs, label_runs, pareto_front, recipe_value
from dgc_fastai.analysis.report.measure import MeasuredRun
from dgc_fastai.analysis.report.page import plain, render
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.inference.predict import Predictor
from dgc_fastai.recipe.loading import load_recipe
from dgc_fastai.recipe.schema import Convert
from helpers import ROOT
from helpers.datasets import write_imagenet
from helpers.stored_runs import store_run


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Times that are not looked at need not be exact."""
    monkeypatch.setattr(latency, "TIMING", (1, 1e-6))
    monkeypatch.setattr(latency, "TIMING_MANY", (1, 1e-6))


def content(page):
    """The data of a page, as its scripts read them."""
    (text,) = re.findall('<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def read(folder):
    return content(write_report([folder]).read_text())["runs"][0]


def test_a_run_has_everything(tmp_path):
    run = read(store_run(tmp_path / "run", environment={"command": "dgc quickstart"}))
    assert (
        run["state"] == "finished"
        and run["epochs"] == [16, 16]
        and run["phases"] == pytest.approx([16 / 12, 12], rel=1e-5)
    )
    assert run["history"]["epoch"] == list(range(1, 17)) and run["top_1"] == pytest.approx(0.9)
    assert sum(layer["macs"] for layer in run["layers"]) == run["macs"] < run["summary"]["macs_dense"]
    assert [row["batch"] for row in run["latency"]] == [1, 64]
    for row in run["latency"]:
        for kind in ("deployed", "dense"):
            assert 0 < row[kind]["min"] <= row[kind]["median"] <= row[kind]["max"]
    assert run["ms"] == run["latency"][0]["deployed"]["median"] and run["evaluation"]["images"] == 360
    assert [line.partition(":")[0] for line in run["missing"]] == ["Accuracy with the gates of another image"]
    assert len(run["gates"]["layers"]) == 3 and run["gates"]["images"] == 360


def test_runs_of_one_network_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MAX_EVALUATED", 2)
    for factor in (0.25, 0.5):
        for seed in range(3):
            overrides = [f"model.gate_factor={factor}", f"train.seed={seed}"]
            store_run(tmp_path / "runs" / f"{factor}-{seed}", *overrides, top_1=factor + seed / 100)
    loaded, load = [], Predictor.from_weights
    monkeypatch.setattr(measure.Predictor, "from_weights", lambda path: loaded.append(path) or load(path))
    data = content(write_report([tmp_path / "runs"]).read_text())
    assert [path.parent.name for path in loaded] == ["0.5-2", "0.5-1", "0.25-2"]
    times = {run["label"]: set() for run in data["runs"]}
    for run in data["runs"]:
        times[run["label"]].add(run["ms"])
        assert sum(layer["macs"] for layer in run["layers"]) == run["macs"] and run["is_gated"]
    assert len(times) == 2 and all(len(one) == 1 for one in times.values())
    assert len({run["dense_ms"] for run in data["runs"]}) == 1
    assert [run["name"] for run in data["runs"] if run["evaluation"]] == ["0.5-1", "0.5-2"]


def test_a_baseline_has_no_gates_and_no_baseline(tmp_path):
    run = read(store_run(tmp_path / "run", "model.arch=dgc_densenet86_dense", environment={"command": "x"}))
    assert all(row["dense"] is None for row in run["latency"]) and run["dense_ms"] is None
    assert run["missing"] == []


def test_evaluation_is_that_of_a_plain_loop(tmp_path):
    predictor = Predictor.from_weights(store_run(tmp_path / "run", "data.batch_size=100"))
    found = ValidationImages(predictor).evaluate()
    images, truth = (
        torch.cat(parts) for parts in zip(*build_dataloaders(predictor.recipe.data, torch.device("cpu")).valid)
    )
    with torch.no_grad():
        probabilities = predictor.model(images.as_subclass(torch.Tensor)).softmax(1)
    score, guess = probabilities.max(1)
    pairs = list(zip(truth.tolist(), guess.tolist()))
    assert found["matrix"] == [[pairs.count((row, column)) for column in range(10)] for row in range(10)]
    assert found["top_1"] == sum(one == other for one, other in pairs) / 360
    assert [one["images"] for one in found["classes"]] == [truth.tolist().count(number) for number in range(10)]
    wrong = sorted((index for index, (one, other) in enumerate(pairs) if one != other), key=lambda n: -score[n])
    assert len(found["mistakes"]) == 24 and found["mistakes"][0]["name"] == f"validation image {wrong[0]}"
    for mistake, index in zip(found["mistakes"], wrong):
        assert mistake["probability"] == pytest.approx(float(score[index]), abs=1e-4)
    assert all(one["picture"].startswith("data:image/png;base64,") for one in found["mistakes"])
    times = [one["images"] for one in found["confusions"]]
    assert times == sorted(times, reverse=True) and sum(times) == len(wrong) if len(times) < 30 else True


def test_an_evaluation_that_would_take_too_long_is_left_out(tmp_path, monkeypatch):
    predictor = Predictor.from_weights(store_run(tmp_path / "run", "data.batch_size=10"))
    clock = iter(range(1000))
    monkeypatch.setattr(evaluation_module.time, "monotonic", lambda: float(next(clock)))
    seen = []
    images = ValidationImages(predictor, 20, lambda done, of: seen.append((done, of)))
    with pytest.raises(TooLong, match="it would have taken about 36 s"):
        images.evaluate()
    assert seen == [(1, 36), (2, 36), (3, 36)]  # as soon as it is clear


def test_mistakes_in_image_files_have_their_names(tmp_path):
    data = write_imagenet(tmp_path / "data", ("cat", "dog"))
    overrides = ["data.name=folder", f"data.path={data}", "data.size=64", "data.batch_size=3"]
    found = ValidationImages(
        Predictor.from_weights(store_run(tmp_path / "run", *overrides, classes=["cat", "dog"]))
    ).evaluate()
    assert found["images"] == 4
    for one in found["mistakes"]:
        assert one["name"].startswith(f"{one['true']}/{one['true']}_") and one["picture"].startswith("data:image/jpeg")
    assert found["mistakes"]


def test_data_that_are_gone_or_changed_are_missing(tmp_path):
    data = write_imagenet(tmp_path / "data", ("cat", "dog"))
    overrides = ["data.name=folder", f"data.path={data}", "data.size=16"]
    folder = store_run(tmp_path / "run", *overrides, classes=["cat", "cow"])
    assert any("other classes" in line for line in read(folder)["missing"])
    data.rename(tmp_path / "moved")
    run = read(folder)
    assert any("there is no folder" in line for line in run["missing"]) and run["evaluation"] is None and run["latency"]


def old_version(folder):
    (folder / "best.safetensors").unlink()
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(
        json.dumps({name: summary[name] for name in ("name", "macs") if name in summary})
    )
    history = (folder / "history.csv").read_text().replace("gate_penalty", "lasso")
    (folder / "history.csv").write_text(history)


def unknown_recipe(folder):
    (folder / "recipe.yaml").write_text("name: old\nnetwork: {kind: x}\n")


def truncate(folder):
    (folder / "history.csv").write_text("epoch,top_1\n1,0.5\n2,nan\nx,\n")
    (folder / "summary.json").write_text("{")
    (folder / "best.safetensors").write_bytes(b"nothing")


def recipe_only(folder):
    for name in ("history.csv", "summary.json", "best.safetensors"):
        (folder / name).unlink()


DAMAGES = {
    old_version: ["no best.safetensors", "did not keep them"],
    unknown_recipe: ["cannot read the recipe"],
    truncate: ["summary.json cannot be read", "history.csv are damaged", "The weights cannot be read"],
    recipe_only: ["No epoch was finished", "no history.csv", "ended after 0 epochs of 16"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_missing_is_said(tmp_path, damage):
    folder = store_run(tmp_path / "run")
    damage(folder)
    missing = "\n".join(read(folder)["missing"])
    for phrase in DAMAGES[damage]:
        assert phrase in missing, missing


def test_a_stopped_run_says_how_far_it_is(tmp_path):
    folder = store_run(tmp_path / "run", epochs=5)
    assert read(folder)["state"] == "stopped"
    (folder / "state.pt").touch()
    run = read(folder)
    assert run["state"] == "interrupted" and "5 epochs of 16" in run["missing"][0] and "--resume" in run["missing"][0]


def test_runs_are_found_once(tmp_path):
    for name in ("b/2", "b/1", "a"):
        store_run(tmp_path / name, weights=False)
    (tmp_path / "b" / "plan").mkdir()
    for name in ("1", "3"):
        (tmp_path / "b" / "plan" / f"{name}.yaml").touch()
    names = [folder.relative_to(tmp_path).as_posix() for folder in find_runs([tmp_path / "b", tmp_path])]
    assert names == ["b/1", "b/2", "a"]
    (tmp_path / "b" / "1").rename(tmp_path / "b" / "1-20260101-000000")
    assert unstarted_runs(tmp_path / "b") == ["3"]


def test_folders_without_a_run_are_refused(app, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "there is no run in it" in app("report", "empty", cwd=tmp_path, expect=2)
    assert "is a file" in app("report", "file", cwd=tmp_path, expect=2)
    assert "no such folder" in app("report", "nothing", cwd=tmp_path, expect=2)


def test_the_command_writes_into_the_run(app, tmp_path):
    store_run(tmp_path / "run", weights=False)
    assert app("report", "run", cwd=tmp_path) == "Wrote run/report.html.\n"
    assert (tmp_path / "run" / "report.html").is_file()
    store_run(tmp_path / "other", weights=False)
    assert app("report", "run", "other", "--out", "x.html", cwd=tmp_path) == "Wrote x.html.\n"


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path):
    for number, (factor, seed) in enumerate([(0.25, 0), (0.25, 1), (0.5, 0)]):
        overrides = [f"model.gate_factor={factor}", f"train.seed={seed}", f"name=r{number}"]
        store_run(tmp_path / f"r{number}", *overrides, weights=False)
    runs = [read_stored_run(folder) for folder in find_runs([tmp_path])]
    keys = common_differences(runs)
    assert keys == ["model.gate_factor"]
    assert label_runs(runs, keys) == ["gate_factor=0.25", "gate_factor=0.25", "gate_factor=0.5"]


def test_values_that_are_sections_have_a_text():
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml")
    model = recipe.model.model_copy(update={"convert": Convert(gate_factor=0.5)})
    run = StoredRun(Path("run"), recipe=recipe.model_copy(update={"model": model}))
    assert '"gate_factor": 0.5' in recipe_value(run, "model.convert")
    chosen = model.model_copy(update={"convert": Convert(target=0.5, gate_factor={"a": 0.5})})
    other = model.model_copy(update={"convert": Convert(target=0.5, gate_factor={"a": 0.25})})
    runs = [StoredRun(Path("run"), recipe=recipe.model_copy(update={"model": one})) for one in (chosen, other)]
    assert common_differences(runs) == [] and '"a"' not in recipe_value(runs[0], "model.convert")


def test_a_sweep_over_seeds_alone_is_labeled_by_its_recipe(tmp_path):
    for seed in (0, 1):
        name = f"000{seed + 1}-quick-seed-{seed}"
        store_run(tmp_path / name, f"train.seed={seed}", f"name={name}", weights=False)
    runs = [read_stored_run(folder) for folder in find_runs([tmp_path])]
    assert label_runs(runs, common_differences(runs)) == ["quick", "quick"]


def test_groups_have_the_standard_error_of_the_mean():
    rows = [dict(id=n, label="a", top_1=top_1, macs=1, ms=None) for n, top_1 in enumerate([0.1, 0.3, None, 0.9])]
    for row in rows:
        row["state"] = "interrupted" if row["top_1"] == 0.9 else "finished"  # its gates are still open
    (group,) = group_runs(rows)
    assert group["top_1"] == pytest.approx(0.2) and group["error"] == pytest.approx(0.1) and group["seeds"] == 2


def test_the_front_is_what_nothing_beats():
    costs = {
        "cheap": (1, 0.5),
        "worse": (2, 0.4),
        "same": (1, 0.4),
        "best": (3, 0.9),
        "dear": (4, 0.9),
        "none": (None, 1),
    }
    groups = [dict(label=name, macs=cost, top_1=top_1) for name, (cost, top_1) in costs.items()]
    assert pareto_front(groups, "macs") == ["cheap", "best"]


def test_heads_that_always_keep_other_channels_do_not_select_by_image(tmp_path):
    folder = store_run(tmp_path / "run", weights=False)
    fixed = {
        "name": "a",
        "channels": 3,
        "heads": 2,
        "usage": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        "usage_by_class": None,
    }
    fixed["by_head"] = {"never_kept": [2, 2], "always_kept": [1, 1]}
    # What no image of thousands keeps, or all but one, is rounded.
    varied = {"name": "b", "channels": 3, "heads": 1, "usage": [[0.5, 1.0, 0.0]], "usage_by_class": [[[1.0, 0.0, 0.0]]]}
    varied["by_head"] = {"never_kept": [1], "always_kept": [0]}
    (folder / "gates").mkdir()
    (folder / "gates" / "gates.json").write_text(json.dumps({"format": 1, "layers": [fixed, varied]}))
    layers = read(folder)["gates"]["layers"]
    assert layers[0]["inputs"] == {"never": 4, "some": 0, "always": 2} and layers[0]["usage"] == [0.5, 0.5, 0]
    assert layers[1]["inputs"] == {"never": 1, "some": 2, "always": 0} and layers[1]["usage_by_class"] == [[1, 0, 0]]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "layers": []}'])
def test_gates_of_another_version_are_missing(tmp_path, text):
    folder = store_run(tmp_path / "run", weights=False)
    (folder / "gates").mkdir()
    (folder / "gates" / "gates.json").write_text(text)
    assert any("gates.json cannot be read" in line for line in read(folder)["missing"])


def test_numbers_are_short_and_finite():
    values = {"a": [math.nan, math.inf, 0.123456789, 3.0, 35123456.75], 1: (True, None, "x")}
    assert plain(values) == {"a": [None, None, 0.123457, 3, 35123457], "1": [True, None, "x"]}


def test_outputs_of_nan_are_mistakes(tmp_path):
    predictor = Predictor.from_weights(store_run(tmp_path / "run", "data.batch_size=100"))
    with torch.no_grad():
        predictor.model.classifier.bias.fill_(math.nan)
    found = ValidationImages(predictor).evaluate()
    assert found["top_1"] < 0.2 and len(found["mistakes"]) == 24


def test_gates_of_other_weights_are_not_the_runs(tmp_path):
    folder = store_run(tmp_path / "run")
    (folder / "gates").mkdir()
    gates = {"format": 1, "layers": [], "weights": str(folder / "last.safetensors")}
    (folder / "gates" / "gates.json").write_text(json.dumps(gates))
    assert read_stored_run(folder).gates is None
    (folder / "gates" / "gates.json").write_text(json.dumps({**gates, "weights": str(folder / "best.safetensors")}))
    assert read_stored_run(folder).gates is not None


def test_a_name_that_is_not_text_and_the_folder_that_one_is_in(tmp_path, monkeypatch):
    folder = store_run(tmp_path / "run\udcff", weights=False)
    assert content(write_report([folder]).read_text())["title"] == "run?"
    monkeypatch.chdir(store_run(tmp_path / "here", weights=False))
    assert content(write_report([Path(".")]).read_text())["title"] == "here"


def test_what_fails_while_timing_is_missing_and_the_rest_is_there(tmp_path, monkeypatch):
    def out_of_memory(*arguments):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(measure, "measure_latency", out_of_memory)
    run = read(store_run(tmp_path / "run", "data.batch_size=100"))
    assert "Latency: CUDA out of memory" in run["missing"] and run["evaluation"] and not run["latency"]


def test_nothing_of_a_run_is_markup(tmp_path):
    evil = "</script><script>alert(1)</script><!--"
    folder = store_run(tmp_path / "run", weights=False, problems=[evil])
    data = page_data(evil, [MeasuredRun(read_stored_run(folder))])
    page = render(data)
    assert content(page)["runs"][0]["summary"]["problems"] == [evil]
    assert "<script>alert" not in page and "<!--" not in page.split('id="data">')[1].split("</script>")[0]


def test_a_page_has_no_address_to_fetch(tmp_path):
    page = write_report([store_run(tmp_path / "run", weights=False)]).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "default-src 'none'" in page
