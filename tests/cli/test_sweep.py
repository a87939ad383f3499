"""sweep."""

import csv
import signal
import statistics
import subprocess
import sys
import time

import pytest
from PIL import Image

from dgc_fastai import load_recipe
from dgc_fastai.training.sweep import combinations, plan_sweep
from dgc_fastai.training.sweep_table import draw_sweep, group_rows
from dgc_fastai.utils.errors import RecipeError
from dgc_fastai.utils.files import file_lock
from helpers import QUICKSTART, ROOT
from helpers.command_line import only, process
from helpers.runs import TINY, silent

SHORT = [*TINY[1:], "model.stages=[1,1,1]", "train.epochs=2", "device=cpu"]
SWEEP = [*SHORT, "model.gate_factor=0.25,1", "train.seed=0,1"]


def test_a_sweep_that_goes_on_needs_the_weights_no_more(tmp_path):
    """The runs have begun, and have their own; only a new sweep is refused."""
    overrides = [*SWEEP, f"output={tmp_path}/runs", f"model.weights={tmp_path}/gone.safetensors"]
    with pytest.raises(RecipeError, match="gone.safetensors"):
        plan_sweep([QUICKSTART], overrides)
    assert len(plan_sweep([QUICKSTART], overrides, resume=True).runs) == 4


def table(folder):
    return list(csv.DictReader(open(folder / "sweep.csv")))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two networks and two seeds, two runs at a time, and what it printed."""
    output = tmp_path_factory.mktemp("swept")
    text = process("sweep", QUICKSTART, *SWEEP, f"output={output}", "log.report=true", "--jobs", "2", COLUMNS="200")
    return only(output), text


def test_a_sweep_has_one_report(swept):
    folder, text = swept
    assert text.splitlines()[-1] == f"Its report: {folder}/report.html"
    assert [path.parent for path in folder.rglob("report.html")] == [folder]


def test_a_sweep_trains_every_combination_and_compares_them(swept, app):
    folder, text = swept
    rows = table(folder)
    labels = [f"gate_factor={factor} seed={seed}" for factor in ("0.25", "1") for seed in (0, 1)]
    assert [row["label"] for row in rows] == labels
    assert Image.open(folder / "sweep.png").size[0] > 800
    for row in rows:
        run = folder / row["run"]
        recipe = load_recipe(run / "recipe.yaml")
        assert f"gate_factor={recipe.model.gate_factor:g} seed={recipe.train.seed}" == row["label"]
        assert recipe.output == str(folder) and recipe.train.seed == int(row["seed"])
        history = list(csv.DictReader(open(run / "history.csv")))
        most = max(float(one["inactive"]) for one in history)
        assert float(row["top_1"]) == max(float(one["top_1"]) for one in history if float(one["inactive"]) == most)
    assert int(rows[0]["macs"]) < int(rows[2]["macs"]) and rows[0]["macs_dense"] == rows[2]["macs_dense"]
    mean = statistics.fmean(float(row["top_1"]) for row in rows[:2])
    (line,) = [line.split() for line in text.splitlines() if line.startswith("gate_factor=0.25  ")]
    assert line[1] == f"{100 * mean:.2f}" and line[3] == "2"
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


def test_a_sweep_that_was_stopped_gives_the_same_table(swept, tmp_path):
    command = [sys.executable, ROOT / "app.py", "sweep", QUICKSTART, *SWEEP, f"output={tmp_path}", "--jobs", "2"]
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("*/sweep.csv")) and time.monotonic() < until:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130 and "--resume" in errors, errors
    before = table(only(tmp_path))
    assert 1 <= len(before) < 4
    text = process("sweep", QUICKSTART, *SWEEP, f"output={tmp_path}", "--jobs", "2", "--resume")
    assert f"Going on with {only(tmp_path)}" in " ".join(text.split()) and "finished already" in text
    ours, theirs = table(only(tmp_path)), table(swept[0])
    assert ours[0]["run"] == before[0]["run"]
    for one, other in zip(ours, theirs, strict=True):
        assert {key: one[key] for key in ("label", "top_1", "macs")} == {
            key: other[key] for key in ("label", "top_1", "macs")
        }


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    overrides = *SHORT, "train.lr=0.01,1e5", "train.optimizer=sgd", "train.lasso_weight=100", f"output={tmp_path}"
    errors = process("sweep", QUICKSTART, *overrides, "--jobs", "2", expect=2)
    folder = only(tmp_path)
    assert f"1 of 2 runs in {folder} failed: lr=1e5: the loss is nan at step" in errors
    assert [row["label"] for row in table(folder)] == ["lr=0.01"]


def test_recipes_are_swept_together(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(QUICKSTART.read_text().replace("name: quickstart", "name: other"))
    sweep = plan_sweep([QUICKSTART, other], [*SHORT, "train.seed=0,1", f"output={tmp_path}"])
    assert [run.label for run in sweep.runs] == [
        "quickstart seed=0", "quickstart seed=1", "other seed=0", "other seed=1",
    ]  # fmt: skip
    assert [run.group for run in sweep.runs] == ["quickstart", "quickstart", "other", "other"]
    assert len({run.recipe.name for run in sweep.runs}) == 4


@pytest.mark.parametrize("words", [["train.seed=0,0"], [QUICKSTART, "train.seed=0,1"]])
def test_runs_that_are_the_same_are_refused(app, tmp_path, words):
    assert "two runs of this sweep are called" in app("sweep", QUICKSTART, *words, f"output={tmp_path}", expect=2)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_any_name_takes_the_runs(tmp_path):
    output = tmp_path / "a: b #1"
    sweep = plan_sweep([QUICKSTART], [*SHORT, "train.seed=0,1", f"output='{output}'"])
    assert sweep.folder.parent == output and all(run.recipe.output == str(sweep.folder) for run in sweep.runs)


def test_a_sweep_that_is_going_on_is_not_begun_again(tmp_path):
    sweep = plan_sweep([QUICKSTART], [*SHORT, "train.seed=0,1", f"output={tmp_path}"])
    sweep.folder.mkdir()
    with pytest.raises(RecipeError, match="cannot make the folder"):
        sweep.train(silent(), 1)
    sweep.is_resumed = True
    (sweep.folder / "lock").touch()
    with file_lock(sweep.folder / "lock"), pytest.raises(RecipeError, match="going on in another process"):
        sweep.train(silent(), 1)


def test_only_a_sweep_of_the_same_runs_is_resumed(tmp_path):
    def plan(*overrides, resume=True):
        return plan_sweep([QUICKSTART], [*SHORT, f"output={tmp_path}", *overrides], resume)

    begun = plan("train.seed=0,1", resume=False)
    (begun.folder / "plan").mkdir(parents=True)
    for run in begun.runs:
        (begun.folder / "plan" / f"{run.recipe.name}.yaml").write_text(run.recipe.to_yaml())
    assert plan("train.seed=0,1").is_resumed and plan("train.seed=0,1").folder == begun.folder
    assert not plan("train.seed=0,1", resume=False).is_resumed
    assert not plan("train.seed=0,1,2").is_resumed
    assert not plan("train.seed=0,1", "train.lr=0.02").is_resumed


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
        rows = [dict(group=str(n), macs=n * 1e6, macs_dense=2e6, top_1=n / 30) for n in range(count)]
        assert draw_sweep(rows, "many").startswith(b"\x89PNG")


def test_rows_that_differ_in_their_seed_are_one():
    rows = [dict(group=name, macs=1, macs_dense=2, top_1=top_1) for name, top_1 in (("a", 0.1), ("b", 1), ("a", 0.3))]
    first, second = group_rows(rows)
    assert (first["label"], first["seeds"], second["seeds"], second["error"]) == ("a", 2, 1, None)
    assert first["top_1"] == pytest.approx(0.2) and first["error"] == pytest.approx(0.1)
