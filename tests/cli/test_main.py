"""The command line as a whole: help, errors, exit codes, and what is imported when."""

import os
import subprocess
import sys

import pytest

import dgc_fastai
from helpers import QUICKSTART, ROOT
from helpers.command_line import process
from helpers.golden import DATA

HEAVY = {"torch", "torchvision", "timm", "fastai", "fastcore", "numpy", "matplotlib", "sklearn", "safetensors"}
COMMANDS = {"list", "copy", "check", "env", "train", "sweep", "evaluate", "predict", "export"}
COMMANDS |= {"benchmark", "compare", "report"}


def python(code, *arguments, cwd=ROOT):
    """What code prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["dgc_fastai.cli", "dgc_fastai.recipe", "dgc_fastai.utils"])
def test_light_packages_import_nothing_heavy(package):
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
modules = [name for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
assert len(modules) > 4, modules
for name in modules:
    importlib.import_module(name)
print(*sorted({HEAVY!r} & sys.modules.keys()))
"""
    assert python(code).split() == []


def test_help_imports_no_more_than_it_needs():
    code = "import sys; from dgc_fastai.cli.main import main; "
    code += "sys.argv[1:] = ['--help']; assert main() == 0; print(*sys.modules)"
    *_, modules = python(code).splitlines()
    assert not (HEAVY | {"pydantic", "yaml"}) & set(modules.split())


def test_help_groups_the_commands_and_gives_examples(app):
    text = app()
    assert text == app("--help")
    groups = [text.index(f"─ {name} ─") for name in ("Start", "Train", "Use", "Measure", "Options")]
    assert groups == sorted(groups)
    assert all(f"│ {name} " in text for name in COMMANDS)
    assert "Examples:" in text and "--install-completion" in text and "--quiet -q" in text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_a_command_has_an_example_and_no_false_defaults(app, command):
    text = app(command, "--help")
    assert f"dgc {command}" in text.split("Example")[1]
    assert "default: False" not in text and "default: None" not in text


def test_version(app):
    assert app("--version").strip() == dgc_fastai.__version__


@pytest.mark.parametrize("start", [["app.py"], ["-m", "dgc_fastai"]], ids=["app.py", "python -m"])
def test_a_clone_is_called_in_two_ways(start, tmp_path):
    done = subprocess.run([sys.executable, *start, "ls"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: there is no command and no recipe 'ls'; did you mean `python {' '.join(start)} list`?\n"
    )


MISTAKES = {
    "unknown key": ((QUICKSTART, "train.epoch=3"), "train.epoch=3: unknown key; did you mean 'train.epochs'?"),
    "unknown section": ((QUICKSTART, "modle.heads=3"), "modle.heads=3: modle: unknown key; did you mean 'model'?"),
    "no section": ((QUICKSTART, "heads=3"), "heads=3: unknown key; did you mean 'model.heads'?"),
    "two words in one": ((QUICKSTART, "model.gatefactor=0.3"), "error: model.gatefactor=0.3: unknown key;"),
    "not a number": ((QUICKSTART, "train.epochs=ten"), "input should be a valid integer"),
    "too small": ((QUICKSTART, "model.gate_factor=0"), "should be greater than 0"),
    "too large": ((QUICKSTART, "model.gate_factor=1.5"), "should be less than or equal to 1"),
    "heads": ((QUICKSTART, "model.heads=3"), "model: heads=3 does not divide the 32 output channels"),
    "group_3x3": ((QUICKSTART, "model.group_3x3=5"), "model: group_3x3=5 does not divide growth=8"),
    "stages": ((QUICKSTART, "model.growth=[8,8]"), "model: stages=[4, 4, 4] and growth=[8, 8] differ in length"),
    "device": ((QUICKSTART, "device=cuda:7"), "use device=cpu"),
    "output": ((QUICKSTART, "output=/proc/nowhere"), "output: "),
    "CIFAR": (("cifar10_densenet86", "data.path=nowhere"), "there is no folder nowhere"),
    "ImageNet": (("imagenet_r18", "data.path=nowhere"), "there is no folder nowhere"),
    "path of a recipe": (("recipes/quikstart.yaml",), "cannot read the recipe: No such file"),
    "name of a recipe": (("quikstart",), "there is no command and no recipe 'quikstart'; did you mean"),
    "name for check": (("check", "quikstart"), "No such file or directory; did you mean 'quickstart'?"),
    "ls": (("ls",), "there is no command and no recipe 'ls'; did you mean `python app.py list`?"),
    "help": (("help",), "there is no command and no recipe 'help'; did you mean `python app.py --help`?"),
    "misspelt command": (("evalute", QUICKSTART), "did you mean `python app.py evaluate`?"),
    "any word": (("frobnicate",), "see `python app.py --help` and `python app.py list`"),
    "no recipe": (("train",), "RECIPE"),
    "option": ((QUICKSTART, "--fast"), "Unknown option: --fast"),
    "option first": (("--fast", QUICKSTART), "Unknown option: --fast"),
    "no weights": (("evaluate", QUICKSTART), "--weights"),
    "missing weights": (("evaluate", QUICKSTART, "--weights", "nowhere"), "nowhere: cannot read the weights: there"),
    "weights in YAML": (
        ("evaluate", QUICKSTART, "--weights", QUICKSTART),
        "quickstart.yaml: cannot read the checkpoint",
    ),
    "foreign weights": (
        ("evaluate", QUICKSTART, "--weights", DATA / "tiny_dydensenet.pth.tar"),
        "does not fit DGCDenseNet",
    ),
    "no override": (("check", QUICKSTART, "nonsense"), "an override reads section.key=value"),
    "completion": (("--install-completion",), "completion is for the installed command"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2_and_leave_nothing(app, tmp_path, arguments, message):
    if "output=/proc/nowhere" in arguments and os.name != "posix":
        pytest.skip("needs a folder nobody can write to")
    text = app(*arguments, cwd=tmp_path, expect=2)
    assert text.startswith("error: ") and text.count("\n") == 1, text
    assert message in text
    assert not list(tmp_path.iterdir())


EARLY = {
    "key": ((QUICKSTART, "train.epoch=3"), "unknown key"),
    "data": (("imagenet_r18", "data.path=nowhere"), "there is no folder nowhere"),
    "weights": (("predict", "nowhere.safetensors", "README.md"), "nowhere.safetensors: cannot read the weights"),
    "weights to export": (("export", "nowhere", "net.onnx"), "nowhere: cannot read the weights"),
    "image": (("predict", "README.md", "nowhere.png"), "nowhere.png: cannot read the image: No such file"),
    "folder of images": (("predict", "README.md", "tests"), "tests: there are no images in this folder"),
}


@pytest.mark.parametrize("arguments, message", EARLY.values(), ids=EARLY)
def test_what_needs_no_torch_is_reported_before_torch_is_imported(tmp_path, arguments, message):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    assert message in process(*arguments, expect=2, PYTHONPATH=str(tmp_path))


def test_the_wheel_holds_every_module_the_kernel_and_the_recipes(tmp_path):
    """What `pip wheel` packs is what setuptools' build_py copies."""
    subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "egg_info", "--egg-base", str(tmp_path),
         "build", "--build-base", str(tmp_path / "build")],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    lib = tmp_path / "build" / "lib" / "dgc_fastai"
    built = {str(path.relative_to(lib)) for path in lib.rglob("*") if path.is_file()}
    sources = {path.relative_to(ROOT / "dgc_fastai") for path in (ROOT / "dgc_fastai").rglob("*") if path.is_file()}
    expected = {str(path) for path in sources if "__pycache__" not in path.parts}
    assert built == expected | {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    # Outside of the clone, the recipes are found inside the package.
    code = "import sys; sys.path.insert(0, sys.argv[1]); from dgc_fastai.recipe.loading import load_recipe as load; "
    code += "import dgc_fastai; print(dgc_fastai.__file__, load('quickstart').name)"
    assert python(code, str(lib.parent), cwd=tmp_path).split() == [str(lib / "__init__.py"), "quickstart"]
    entry = (tmp_path / "dgc_fastai.egg-info" / "entry_points.txt").read_text()
    assert "dgc = dgc_fastai.cli.main:run" in entry
