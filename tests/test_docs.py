"""What the pages promise: their code runs, their commands are accepted, their links lead somewhere."""

import ast
import io
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from typing import get_args

import matplotlib
import pytest
import timm
import torch
import yaml
from fastai.learner import Learner
from PIL import Image

import dgc_fastai
from dgc_fastai import budget, load_recipe
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.ops import BACKENDS
from dgc_fastai.recipe.catalogue import describe_recipes, find_recipe, recipes_folder
from dgc_fastai.recipe.schema import Recipe, Section
from helpers import ROOT
from helpers.datasets import write_imagenet
from helpers.pages import PAGES, README, anchors, blocks, commands, links
from helpers.runs import TINY, start

DOCS = ROOT / "docs"
PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]
COMMAND_PAGES = [page for page in PAGES if commands(page)]


def name(page):
    return page.stem


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    folder, _ = start(["train.epochs=1", f"output={tmp_path_factory.mktemp('runs')}"])
    return folder


@pytest.fixture
def scene(tmp_path, monkeypatch, run):
    """A folder with what the examples read: pictures of two classes, two pictures, a recipe, a run."""
    write_imagenet(tmp_path, classes=("cat", "dog"), train=50, valid=1)
    (tmp_path / "train").rename(tmp_path / "pictures")
    for animal in ("cat", "dog"):
        Image.new("RGB", (40, 30), "gray").save(tmp_path / f"{animal}.jpg")
    shutil.copytree(tmp_path / "pictures", tmp_path / "photos")
    (tmp_path / "recipes").mkdir()
    quickstart = load_recipe(ROOT / "recipes/quickstart.yaml", TINY)
    (tmp_path / "recipes/quickstart.yaml").write_text(quickstart.to_yaml())
    shutil.copytree(run, tmp_path / "runs/NAME")
    shutil.copytree(run, tmp_path / "runs/OTHER")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_epoch(self, epochs, *args, original=Learner.fit_one_cycle, **kwargs):
    return original(self, 1, *args, **kwargs)


def lr_find(self, *args, original=Learner.lr_find, **kwargs):
    return original(self, num_it=8)


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name)
def test_python_examples_run(page, scene, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.setattr(Learner, "fit_one_cycle", one_epoch)
    monkeypatch.setattr(Learner, "lr_find", lr_find)
    names = {}
    for block in blocks(page, "python"):
        code = compile(block.code, f"{page.name}: {block.code.splitlines()[0]}", "exec")
        if block.runs:
            exec(code, names)
    CHECKS.get(page.stem, lambda names, output: None)(names, capsys.readouterr().out)


def check_readme(names, output):
    (one_liner,) = re.findall(r'python -c "([^"]*)"', README.read_text())
    with redirect_stdout(io.StringIO()) as printed:
        exec(one_liner, {})
    macs = [round(int(number) / 1e6) for number in printed.getvalue().split()]
    assert "| {} of {:,} M |".format(*macs) in README.read_text()
    assert re.search(r"^543 of 1814 M multiply-accumulates$", output, re.M)
    columns = dict(zip(names["learn"].recorder.metric_names, [None, *names["learn"].recorder.values[-1], None]))
    assert 0 < columns["inactive"] <= 0.75
    assert not dgc_layers(names["deployed"]) and dgc_layers(names["learn"].model)


def check_python(names, output):
    assert "torch.Size([2, 128, 8, 8])" in output and "torch.Size([1, 10])" in output
    assert names["loss"].isfinite() and dgc_layers(names["model"])[0].inactive_channels == 12


CHECKS = {"README": check_readme, "python": check_python}


def test_notebook_is_the_page():
    """The page's blocks are run above, so the notebook's cells are, too."""
    script = runpy.run_path(str(DOCS / "make_notebook.py"))
    for name in script["PAGES"]:
        assert (DOCS / f"{name}.ipynb").read_text() == script["notebook"]((DOCS / f"{name}.md").read_text())


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=name)
def test_commands_are_accepted(page, monkeypatch):
    """Every command is one of ours with options that it has; its recipe exists and takes its values."""
    from dgc_fastai.cli.main import _parse, app

    monkeypatch.chdir(ROOT)
    for words in commands(page):
        words = ["imagenet_r18" if word == "RECIPE" else word for word in words]
        _parse(*words)
        overrides = [word for word in words if re.match(r"[a-z_0-9.]+=", word)]
        if words[0] == "sweep":
            overrides = [f"{key}={value}" for key, values in split(overrides) for value in values]
        if words[0] not in app:
            load_recipe(find_recipe(words[0]), overrides)
        elif words[0] in ("benchmark", "check", "compress", "copy", "evaluate", "sweep", "train"):
            load_recipe(find_recipe(words[1]), overrides)
        else:
            assert not overrides


def split(overrides):
    for override in overrides:
        key, values = override.split("=")
        yield key, values.split(",")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name)
def test_shell_examples_are_shell(page):
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
        assert not done.stderr, block.code


def test_short_commands_run(scene, app):
    """Those of docs/cli.md that take no time; the others have tests of their own."""
    quick = {"check", "compare", "copy", "export", "list", "predict"}
    ran = set()
    for words in commands(DOCS / "cli.md"):
        if words[0] in quick:
            app(*words, cwd=scene)
            ran.add(words[0])
    assert ran == quick


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_have_as_many_cells_in_every_row(page):
    for table in re.findall(r"(?:^\|.*\|\n)+", page.read_text(), re.M):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        if page.suffix == ".md":
            paths = [link.partition("#")[0] for link in links(page) if not link.startswith("http")]
            waiting += [(page.parent / path).resolve() for path in paths if path]
    assert {
        *PAGES,
        *DOCS.glob("*.ipynb"),
        *(DOCS / "figures").glob("*.svg"),
        *(DOCS / "figures").glob("*.png"),
    } <= reached


def test_readme_is_short_and_its_commands_are_ci_s():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    _, install_and_run, install_and_test, *_ = (block.code.strip() for block in blocks(README, "bash"))
    assert install_and_run.endswith(".venv/bin/pip install -q -e . && .venv/bin/python app.py recipes/quickstart.yaml")
    assert install_and_test in (ROOT / ".ci/run").read_text().splitlines()


def test_targets_are_those_of_the_recipes():
    pages = README.read_text(), (DOCS / "recipes.md").read_text()
    for recipe in describe_recipes(recipes_folder()):
        target = re.findall(r"[\d.]+ %", recipe.target)
        for page in pages:
            row = re.search(rf"^\| `{recipe.path.stem}` \|.*\| ?(.*)\|$", page, re.M)
            if not (row or target or page is pages[1]):  # the README has room for some
                continue
            assert row and re.findall(r"[\d.]+ %", row[1]) == target, recipe.path


def schema_keys(section=Recipe, prefix=""):
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from schema_keys(field.annotation, f"{prefix}{key}.")
            continue
        yield f"{prefix}{key}", field
        for optional in get_args(field.annotation):
            if isinstance(optional, type) and issubclass(optional, Section):
                yield from schema_keys(optional, f"{prefix}{key}.")


def test_every_key_of_a_recipe_is_described_with_its_default():
    rows = re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \|([^|]*)\| \S", (DOCS / "recipes.md").read_text(), re.M)
    described = {key: default for keys, default in rows for key in re.findall(r"`([\w.]+)`", keys)}
    fields = dict(schema_keys())
    assert fields.keys() <= described.keys()
    for key, field in fields.items():
        default = described[key].strip(" `")
        if default == "required":
            assert field.is_required(), key
        elif key == "data.valid_share":
            recipe = load_recipe(ROOT / "recipes/pictures_resnet18.yaml")
            assert recipe.data.held_out == float(default)
        elif default and not default.startswith("of the"):
            assert yaml.safe_load(default) == field.default, key
        else:
            assert field.default is None, key


def test_costs_of_the_networks_are_those_listed():
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]* \| ([\d.,]+) of ([\d.,]+) M \| ([\d.]+) M", (DOCS / "models.md").read_text(), re.M
    )
    assert len(rows) == 7
    for network, *numbers in rows:
        with torch.device("meta"):
            model = timm.create_model(network)
        cost = budget(model, model.default_cfg["input_size"])
        for number, count in zip(numbers, (cost.macs, cost.macs_dense, cost.parameters)):
            digits = len(number.partition(".")[2])
            assert f"{count / 1e6:,.{digits}f}" == number, network


def test_backends_are_those_listed():
    table = (DOCS / "python.md").read_text().partition("| backend |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", re.sub(r"\| [^`|]*\|$", "", table, flags=re.M))) == set(BACKENDS)


def test_packages_are_those_of_the_map():
    text = (DOCS / "design.md").read_text()
    package = ROOT / "dgc_fastai"
    folders = {path.name for path in package.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert set(re.findall(r"^  (\w+)/ ", text, re.M)) == folders
    # The way of a recipe is the one that training/run.py tells.
    way = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.M)
    assert way == re.findall(r"^\d\. `([\w/]+\.py)`", (package / "training/run.py").read_text(), re.M)
    assert all((package / path).exists() for path in way)
    order = re.search(r"^((?:\w+ > )+\w+)\.", text, re.M)[1].split(" > ")
    assert {*order, "recipe", "utils"} == folders


def test_the_drawing_of_the_layer_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_layer.py", str(tmp_path / "layer.svg")])
    script = runpy.run_path(str(DOCS / "figures/draw_layer.py"))
    layer = script["run_layer"]()
    assert layer["kept"].sum(1).tolist() == [3, 3]  # the picture's captions say how many are kept
    # The output of the layer is its definition applied to what the picture shows.
    assert layer["output"].shape == (8, 32, 32) and torch.isfinite(layer["output"]).all()
    script["main"]()
    assert "<svg" in (tmp_path / "layer.svg").read_text()


def test_citation_and_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dgc_fastai.__version__
    assert citation["preferred-citation"]["title"] in README.read_text()
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_say_accuracy_or_convert(page):
    """One kind of number: accuracy. Python in the pages is valid, also where it is not run."""
    assert not re.search(r"top-\d error|error rate", page.read_text(), re.I)
    for block in blocks(page, "python"):
        ast.parse(block.code)
