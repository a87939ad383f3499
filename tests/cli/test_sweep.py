"""sweep."""

import csv

import pytest
from PIL import Image

from dgc_fastai import load_recipe
from dgc_fastai.training.sweep import combinations, draw_sweep
from helpers import QUICKSTART
from helpers.command_line import only
from helpers.runs import TINY

SHORT = [*TINY, "train.epochs=2"]


def test_a_sweep_trains_every_combination_and_compares_them(app, tmp_path):
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
    assert [float(line[1]) for line in lines] == pytest.approx([100 * top_1 for top_1 in best], abs=0.01)
    assert (
        "model.gate_factor" in text
        and "train.seed" in text
        and "heads" not in text
        and all(row["run"] in text for row in rows)
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.gate_factor=0.5"], "a sweep needs a key with several values"),
        (
            ["model.gate_factor=0.5,2"],
            "model.gate_factor=2: input should be less than or equal to 1",
        ),
        (["model.heads=2,3"], "model: heads=3 does not divide"),
        (["model.head=2,4"], "did you mean 'model.heads'"),
    ],
)
def test_a_sweep_tries_every_combination_before_it_begins(app, tmp_path, overrides, message):
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
