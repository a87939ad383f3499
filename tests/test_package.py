"""The package as one imports it, each time in a fresh process: what is loaded, and what timm then knows."""

import subprocess
import sys

import pytest

from helpers import ROOT

HEAVY = "torch", "timm", "fastai", "numpy", "matplotlib", "sklearn"


def fresh(*lines):
    """Prints of a process that runs these lines."""
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def loaded(*lines):
    """Which of the heavy packages a process has loaded in the end."""
    return set(fresh("import sys", *lines, f"print(*(name for name in {HEAVY} if name in sys.modules))"))


@pytest.mark.parametrize(
    "lines, expected",
    [
        pytest.param(["import dgc_fastai"], set(), id="the package"),
        pytest.param(["import dgc_fastai", "dir(dgc_fastai), dgc_fastai.__version__"], set(), id="its names"),
        pytest.param(["from dgc_fastai import RecipeError, load_recipe"], set(), id="recipes"),
    ],
)
def test_what_loads_nothing_heavy(lines, expected):
    assert loaded(*lines) == expected


@pytest.mark.parametrize("name", ["DynamicGroupConv2d", "budget", "convert", "deploy", "load_checkpoint", "models"])
def test_networks_and_inference_need_no_fastai(name):
    assert not {"fastai", "matplotlib", "sklearn"} & loaded(f"from dgc_fastai import {name}")


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["import timm, dgc_fastai"], id="timm first"),
        pytest.param(["import dgc_fastai, timm"], id="timm last"),
        pytest.param(["import timm.models, dgc_fastai, timm"], id="timm.models first"),
        pytest.param(["import dgc_fastai", "from timm import models", "import timm"], id="timm.models last"),
        pytest.param(["from dgc_fastai import set_progress", "import timm"], id="a layer's function first"),
        pytest.param(["import dgc_fastai.models, timm"], id="our models first"),
        pytest.param(
            ["import dgc_fastai, importlib.util", "importlib.util.find_spec('timm')", "import timm"],
            id="somebody looks for timm in between",
        ),
    ],
)
def test_timm_knows_the_networks(lines):
    assert fresh(*lines, "print(timm.is_model('dgc_resnet18'), len(timm.list_models('dgc_*')))") == ["True", "21"]


def test_public_names_are_what_they_say_after_every_module_was_imported():
    lines = (
        "import pkgutil, importlib, dgc_fastai",
        "for module in pkgutil.walk_packages(dgc_fastai.__path__, 'dgc_fastai.'):",
        "    if not module.name.endswith('__main__'):",
        "        importlib.import_module(module.name)",
        "from dgc_fastai import *",
        "names = [name for name in dgc_fastai.__all__ if name != 'models']",
        "print(*(name for name in names if not callable(globals()[name]) or not callable(getattr(dgc_fastai, name))))",
        "assert len(names) > 10 and type(dgc_fastai.models) is type(pkgutil)",
    )
    assert fresh(*lines) == []


def test_unknown_names_are_refused():
    with pytest.raises(ImportError, match="nothing"):
        exec("from dgc_fastai import nothing")
