"""What comes from others executes nothing, and reaches nowhere but where the command line points."""

import ast
import gzip
import io
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dgc_fastai.data import small_sets as readers
from dgc_fastai.inference.export import export
from dgc_fastai.inference.predict import Predictor
from dgc_fastai.recipe.loading import load_recipe, parse_recipe
from dgc_fastai.recipe.schema import Data
from dgc_fastai.training.run_folder import interrupted_run
from dgc_fastai.utils.errors import RecipeError, UserError
from helpers import QUICKSTART, ROOT
from helpers.command_line import only
from helpers.datasets import write_cifar
from helpers.runs import TINY, start

SOURCES = [ROOT / "app.py", *(ROOT / "dgc_fastai").rglob("*.py")]
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "import_module", "extractall", "unpack_archive",
    "load_learner", "loads_pickle", "load_all", "unsafe_load", "full_load", "Unpickler", "load_pickle", "execfile",
}  # fmt: skip


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_no_source_loads_what_could_execute():
    """Of what there is to call; a method of an object's own, such as `network.eval()`, is none of these."""
    found = set()
    for path in SOURCES:
        for node, name in calls(path):
            place = f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
            owner, _, last = name.rpartition(".")
            if name == "importlib.import_module" and path.parent.name == "dgc_fastai":
                continue  # public names are loaded by a fixed table of our own modules
            if last in FORBIDDEN - {"eval", "compile"} or (not owner and last in FORBIDDEN):
                raise AssertionError(place)
            if owner in ("pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "np", "numpy", "tarfile"):
                assert not last.startswith(("load", "open")), place
            assert name not in ("os.system", "os.popen"), place
            if owner == "yaml":
                assert last in ("dump", "safe_dump"), place
            if name in ("torch.load", "Loader", "_ArraysOnly"):
                found.add(f"{path.name} {name}")
            if name == "torch.load":
                assert [key.value.value for key in node.keywords if key.arg == "weights_only"] == [True], place
            assert not [key for key in node.keywords if key.arg == "shell"], place
    # The whole list: a new one is to be looked at.
    assert found == {
        "checkpoints.py torch.load", "state_file.py torch.load", "yaml_text.py Loader", "small_sets.py _ArraysOnly"
    }  # fmt: skip


OPENED, WATCHED = [], []


def watch(event, arguments):
    if WATCHED and event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "import"):
        OPENED.append(str(arguments[0]))


sys.addaudithook(watch)  # for good: there is no way to remove one

HOSTILE = ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system", "!!python/module:antigravity"]


@pytest.mark.parametrize("value", HOSTILE, ids=["apply", "name", "module"])
def test_yaml_executes_nothing(app, tmp_path, value):
    value = value.format(tmp_path / "was_run")
    text = QUICKSTART.read_text()
    (tmp_path / "recipe.yaml").write_text(text + f"\nx: {value}\n")
    for arguments in (("check", tmp_path / "recipe.yaml"), ("check", QUICKSTART, f"train.epochs={value}")):
        answer = app(*arguments, expect=2)
        assert "could not determine a constructor for the tag" in answer and answer.count("\n") == 1, answer
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"classes": '["a"]', "recipe": f"name: {value}"})
    answer = app("predict", tmp_path / "x.safetensors", QUICKSTART, expect=2)
    assert "x.safetensors:1: not valid YAML: could not determine" in answer and answer.count("\n") == 1, answer
    assert not (tmp_path / "was_run").exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize("key, value", [
    ("model.arch", "os.system"), ("model.arch", "timm/resnet18"), ("model.arch", "hf-hub:someone/model"),
    ("train.optimizer", "os.system"), ("train.optimizer", "torch.optim.SGD"), ("train.optimizer", "../x"),
    ("log.loggers", "[os]"), ("data.name", "os"), ("train.schedule", "os.system"), ("data.augment", "[os.system]"),
    ("name", "../up"), ("name", "/etc/x"), ("name", ".."), ("name", ".hidden"), ("name", "a/b"), ("name", "a\\b"),
    ("name", "'a\n'"), ("device", "cuda:0; true"), ("device", "meta"),
])  # fmt: skip
def test_a_recipe_names_neither_code_nor_places_by_other_keys(app, tmp_path, key, value):
    command = [] if key == "train.optimizer" else ["check"]  # the optimizer's name is timm's to know
    answer = app(*command, QUICKSTART, f"{key}={value}", cwd=tmp_path, expect=2)
    assert key in answer and answer.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_paths_stay_where_they_point(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SECRET", "x")
    for written, meant in (
        ("~/runs", "/home/somebody/runs"), ("$SECRET/${SECRET}", "$SECRET/${SECRET}"), ("a*?[b]", "a*?[b]"),
        ("a/~/b", "a/~/b"), ("$(true)`true`", "$(true)`true`"),
    ):  # fmt: skip
        recipe = load_recipe(QUICKSTART, [f"output='{written}'", "data.name=folder", f"data.path='{written}'"])
        assert recipe.runs == recipe.data.folder == Path(meant)


def test_the_recipe_in_weights_points_nowhere(tmp_path):
    run, _learn = start([f"output={tmp_path}/runs", "train.epochs=1"])
    bait = tmp_path / "bait"
    for name in ("bait/train/a", "bait/train/b", "bait/val/a", "bait/val/b"):
        (tmp_path / name).mkdir(parents=True)
    overrides = "data.name=folder", f"data.path={bait}", f"output={bait}", "data.size=8", "log.loggers=[tensorboard]"
    recipe = load_recipe(run / "recipe.yaml", overrides)
    hostile = recipe.model_copy(update={"device": "cuda:7"}).to_yaml()
    state = load_file(run / "last.safetensors")
    state["stem.weight"] = state["stem.weight"].repeat(1, 3, 1, 1)  # three color channels
    save_file(state, tmp_path / "x.safetensors", {"classes": '["0"' + ', "x"' * 9 + "]", "recipe": hostile})
    from PIL import Image

    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    WATCHED.append(True)
    try:
        predictor = Predictor.from_weights(tmp_path / "x.safetensors")
        (classes,) = predictor.predict([tmp_path / "image.png"])
        export(predictor, tmp_path / "net.pt2")
    finally:
        WATCHED.clear()
    assert len(classes) == 10 and any("image.png" in path for path in OPENED)
    assert not [path for path in OPENED if "bait" in path]
    assert sorted(path.name for path in bait.rglob("*")) == ["a", "a", "b", "b", "train", "val"]


def test_a_hostile_run_folder_is_passed_by(tmp_path):
    start([f"output={tmp_path}", "train.epochs=1"])
    recipe = load_recipe(QUICKSTART, [*TINY, f"output={tmp_path}"])
    run = only(tmp_path)
    (run / "state.pt").write_bytes(pickle.dumps(Call(print, "executed")))
    for text in (
        f"name: {HOSTILE[0].format(tmp_path / 'was_run')}", "name: ../../x", "", "- 1", "\x00", "[" * 5000,
        "a: &a [*a]",
        recipe.to_yaml().replace("name: quickstart", "name: ../quickstart"),
    ):  # fmt: skip
        (run / "recipe.yaml").write_text(text)
        assert interrupted_run(recipe)[0] is None
    (run / "recipe.yaml").write_bytes(b"\xff")
    assert interrupted_run(recipe)[0] is None
    shutil.rmtree(run)
    run.symlink_to(tmp_path / "nowhere")
    assert interrupted_run(recipe)[0] is None and not (tmp_path / "was_run").exists()


# CIFAR's pickles ------------------------------------------------------------------------------------------


class Call:
    """Is pickled as a call of a function, and a state for what the call returns."""

    def __init__(self, function, *arguments, state=None):
        self.recipe = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.recipe


RECONSTRUCT = np.empty(0).__reduce__()[0]
ENCODE = __import__("codecs").encode
FALSE_OBJECTS = Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))


PICKLES = {
    "os.system": lambda target: Call(__import__("os").system, f"touch {target}"),
    "eval": lambda target: Call(eval, f"open({str(target)!r}, 'w')"),
    "tofile": lambda target: Call(np.ndarray.tofile, np.zeros(1), str(target)),
    "save": lambda target: Call(np.save, str(target), np.zeros(1)),
    "load": lambda target: Call(np.load, str(target)),
    # By allowed names only: bytes that are to become pointers, and other misuse.
    "array of objects": lambda target: Call(np.ndarray, (1,), "O", b"AAAAAAAA"),
    "state of objects": lambda target: _reconstructed((1, (1,), FALSE_OBJECTS, False, b"AAAAAAAA")),
    "large shape": lambda target: _reconstructed((1, (2**40,), np.dtype("u1"), False, b"A")),
    "negative shape": lambda target: _reconstructed((1, (-1, 0), np.dtype("u1"), False, b"A")),
    "large array": lambda target: Call(RECONSTRUCT, np.ndarray, (2**50,), b"b"),
    "state that is a number": lambda target: _reconstructed(3),
    "zlib": lambda target: Call(ENCODE, "x" * 100, "zlib_codec"),
    "encoded twice": lambda target: Call(ENCODE, Call(ENCODE, "x", "latin1"), "latin1"),
    "not latin1": lambda target: Call(ENCODE, "\u20ac", "latin1"),
    "dtype of an array": lambda target: Call(np.dtype, Call(RECONSTRUCT, np.ndarray, (0,), b"b")),
}


def _reconstructed(state):
    return Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=state)


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
def test_cifar_s_pickles_execute_nothing(tmp_path, make):
    folder, *_ = write_cifar(tmp_path, "cifar10")
    target = tmp_path / "was_run"
    file = folder / "data_batch_3"
    good = pickle.loads(file.read_bytes())
    for key in ("data", "labels"):
        file.write_bytes(pickle.dumps({**good, key: make(target)}, 2))
        with pytest.raises(RecipeError) as error:
            readers.small_set(Data(name="cifar10", path=str(tmp_path)))
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        assert not target.exists()


def test_cifar_s_pickles_call_nothing_but_stand_ins():
    assert {value.__module__ for value in readers._ArraysOnly._allowed.values()} == {"dgc_fastai.data.small_sets"}
    with pytest.raises(pickle.UnpicklingError, match="it names the encoding 'zlib_codec'"):
        readers._ArraysOnly(io.BytesIO(pickle.dumps(Call(ENCODE, "x", "zlib_codec")))).load()


def test_cifar_s_pickles_of_any_protocol_are_read(tmp_path):
    folder, content, _ = write_cifar(tmp_path, "cifar10")
    for protocol in (0, 1, 2, 3, 4):
        for order in "CF":
            images, labels = content["data_batch_1"]
            batch = {"data": np.asarray(images, order=order), "labels": labels.tolist()}
            (folder / "data_batch_1").write_bytes(pickle.dumps(batch, protocol))
            (found, _), _ = readers.small_set(Data(name="cifar10", path=str(tmp_path)))
            assert np.array_equal(found[: len(images)].flatten(1).numpy(), images)


def test_packed_files_unpack_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_BYTES", 10_000)
    for count, name in ((9_000, "good.gz"), (20_000, "bomb.gz")):
        head = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big")
        (tmp_path / name).write_bytes(gzip.compress(head + bytes(count)))
    assert len(readers._idx_file(tmp_path / "good.gz", axes=1)) == 9_000
    with pytest.raises(RecipeError, match="bomb.gz is damaged"):
        readers._idx_file(tmp_path / "bomb.gz", axes=1)
    (tmp_path / "wide").write_bytes(bytes([0, 0, 8, 3]) + 2 * (2**31).to_bytes(4, "big") + (4).to_bytes(4, "big"))
    with pytest.raises(RecipeError, match="wide is damaged"):  # 2^64 bytes, which is 0 in 64 bits
        readers._idx_file(tmp_path / "wide", axes=3)


def test_a_recipe_in_a_message_is_a_message(tmp_path):
    """Colors and commands of a terminal, in what a file says, stay text in one line."""
    with pytest.raises(UserError) as error:
        parse_recipe("name: '\\e[2J[bold]x'\n".replace("\\e", "\x1b"), "x.yaml")
    assert "\n" not in str(error.value)
