"""compare."""

import json

import pytest

from dgc_fastai import load_recipe


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Makes run folders from recipes, in the working folder; the first is the worst."""
    monkeypatch.setenv("COLUMNS", "80")

    def make(*recipes):
        for number, (name, *overrides) in enumerate(recipes):
            folder = tmp_path / f"run{number}"
            folder.mkdir()
            (folder / "recipe.yaml").write_text(load_recipe(name, overrides).to_yaml())
            best = {"epoch": 3, "top_1": 0.5 + number / 100, "top_5": 0.9, "inactive": 0.75}
            cost = {"macs": 738_400, "macs_dense": 1_305_952, "operations": 800_998, "parameters": 234_810}
            (folder / "summary.json").write_text(json.dumps({"best": best, "epochs": 3, "seconds": 3700, **cost}))
        return [f"run{number}" for number in range(len(recipes))]

    return make


def test_runs_are_compared_best_first(app, runs, tmp_path):
    folders = runs(["quickstart"], ["quickstart", "model.gate_factor=0.5", "name=other"])
    text = app("compare", *folders, cwd=tmp_path)
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "51.00", "90.00", "75.00", "0.74", "57", "0.23", "3/16", "1:01:40"] in rows
    assert rows.index(["1", "run1"]) < rows.index(["2", "run0"])
    assert rows[-1] == ["model.gate_factor", "0.5", "0.25"] and "heads" not in text and "name" not in text


def test_unlike_runs_have_a_row_for_each_key(app, runs, tmp_path):
    folders = runs(["quickstart"], ["imagenet_r18", "data.path=/data/imagenet"])
    text = app("compare", *folders, cwd=tmp_path)
    assert "\u2026" not in text and all(len(line) <= 80 for line in text.splitlines())
    rows = [line.split() for line in text.splitlines()]
    assert ["model.arch", "dgc_resnet18", "dgc_densenet86"] in rows and ["train.epochs", "120", "16"] in rows
    assert ["data.path", "/data/imagenet", "-"] in rows


def test_values_too_wide_for_a_table_have_a_line_each(app, runs, tmp_path):
    path = "/data" + 80 * "x"
    folders = runs(["quickstart"], ["imagenet_r18", f"data.path={path}"], ["quickstart", "train.seed=1"])
    text = app("compare", *folders, cwd=tmp_path)
    assert "\u2026" not in text
    assert f"data.path\n    -: runs 1, 3\n    {path}: run 2\n" in text


def test_runs_of_one_recipe_differ_in_nothing(app, runs, tmp_path):
    text = app("compare", *runs(["quickstart"], ["quickstart", "output=elsewhere"]), cwd=tmp_path)
    assert "recipe key" not in text and text.endswith("2  run0\n")


def test_what_is_no_run_cannot_be_compared(app, tmp_path):
    assert "not the folder of a run" in app("compare", tmp_path, expect=2)
    (tmp_path / "summary.json").write_text("{")
    assert "cannot read the run" in app("compare", tmp_path, expect=2)
