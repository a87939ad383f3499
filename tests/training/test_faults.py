"""What goes wrong outside: full disks, damaged files. One line each, nothing lost, and the run goes on afterwards."""

import errno
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from dgc_fastai import load_recipe
from dgc_fastai.analysis.benchmark import benchmark, benchmark_folder
from dgc_fastai.analysis.timing import Measurement, Variant
from dgc_fastai.inference.predict import Predictor
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.training.state_file import read_state
from dgc_fastai.utils.errors import CheckpointError, UserError, WriteError
from helpers import QUICKSTART, ROOT
from helpers.command_line import only
from helpers.corruption import other_byte
from helpers.runs import TINY, StopAt, history, same_run, start, whole_files


def content(folder):
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.endswith(".partial"))
    return {path.name: path.read_bytes() for path in files}


@contextmanager
def full_disk(name, time=1, code=errno.ENOSPC):
    """A disk on which the nth write of files of that name fails; nothing of what was there may change then.

    Yields a list: of the folder, and of what was in it when the write failed.
    """
    make, sync, current, found = tempfile.mkstemp, os.fsync, [], []

    def mkstemp(**kwargs):
        current[:] = [kwargs["prefix"].strip("."), kwargs["dir"]]
        return make(**kwargs)

    def fsync(handle):
        nonlocal time
        time -= current[0] == name
        if current[0] == name and time <= 0:
            found[:] = [current[1], content(current[1])]
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            raise OSError(code, os.strerror(code))
        sync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", mkstemp)
        patch.setattr(os, "fsync", fsync)
        yield found
    assert found, f"nobody wrote {name}"


def test_a_disk_full_at_any_file_costs_nothing(tmp_path):
    keep = "log.keep_every=2"
    whole, _ = start([keep, f"output={tmp_path}/whole"])
    output = f"output={tmp_path}/parts"
    with full_disk("recipe.yaml"), pytest.raises(WriteError, match="cannot write .*recipe.yaml: No space left"):
        start([keep, output])
    assert not list((tmp_path / "parts").iterdir())
    with full_disk("state.pt"), pytest.raises(WriteError, match="state.pt: No space left"):
        start([keep, output])
    assert sorted(content(only(tmp_path / "parts"))) == ["recipe.yaml"]
    shutil.rmtree(tmp_path / "parts")
    assert start([keep, output], callback=StopAt(0, 0))[0] is None
    for name, time, code in (
        ("history.csv", 1, errno.EDQUOT), ("best.safetensors", 1, errno.EFBIG), ("summary.json", 1, errno.EROFS),
        ("state.pt", 1, errno.EIO), ("last.safetensors", 2, errno.ENOSPC), ("epoch_0002.safetensors", 1, errno.ENOSPC),
        ("curves.png", 1, errno.ENOSPC),  # all is done but the picture
    ):  # fmt: skip
        with full_disk(name, time, code) as found, pytest.raises(WriteError) as error:
            start([keep, output], resume=True)
        folder = only(tmp_path / "parts")
        remedy = "free some space" if code in (errno.ENOSPC, errno.EDQUOT) else "check that it is there and writable"
        assert str(error.value) == (
            f"cannot write {folder / name}: {os.strerror(code)}; {remedy}, then go on: "
            f"dgc {folder / 'recipe.yaml'} --resume"
        )
        assert found == [folder, content(folder)] and not list(folder.glob(".*"))
        whole_files(folder)
        assert (folder / "state.pt").exists()
    assert same_run(whole, start([keep, output], resume=True)[0])


def test_a_full_disk_under_the_terminal_s_text_too(tmp_path):
    whole, _ = start([f"output={tmp_path}/whole"])
    recipe = load_recipe(QUICKSTART, [*TINY, f"output={tmp_path}/parts"])

    class Full(io.StringIO):
        def write(self, text):
            if text.strip().startswith("2"):  # the line of the second epoch
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(text)

    with pytest.raises(WriteError, match=r"No space left on device; mend that, then go on: dgc .* --resume$"):
        TrainingRun(recipe).fit(Console(file=Full()))
    assert same_run(whole, start([f"output={tmp_path}/parts"], resume=True)[0])


def test_a_full_disk_under_tensorboard_too(tmp_path, monkeypatch):
    module = pytest.importorskip("tensorboard.summary.writer.record_writer")
    whole, _ = start([f"output={tmp_path}/whole"])

    write, written = module.RecordWriter.write, []

    def full(writer, record):
        written.append(record)
        if len(written) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, record)

    logged = f"output={tmp_path}/parts", "log.loggers=[tensorboard]"
    with monkeypatch.context() as patch:
        patch.setattr(module.RecordWriter, "write", full)
        with pytest.raises(WriteError, match="No space left on device; mend that, then go on: dgc .* --resume$"):
            start(logged)
    whole_files(only(tmp_path / "parts"))
    parts, _ = start(logged, resume=True)
    shutil.rmtree(parts / "tensorboard")
    assert same_run(whole, parts)


def test_the_bars_are_closed_when_the_disk_is_full(tmp_path):
    recipe = load_recipe(QUICKSTART, [*TINY, f"output={tmp_path}"])
    terminal = io.StringIO()
    with full_disk("last.safetensors"), pytest.raises(WriteError):
        TrainingRun(recipe).fit(Console(file=terminal, force_terminal=True, width=80))
    hidden, shown = (terminal.getvalue().rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))  # the cursor
    assert 0 <= hidden < shown


def test_on_the_command_line(app, tmp_path):
    with full_disk("last.safetensors", time=2):
        text = app(QUICKSTART, *TINY, "output=runs", cwd=tmp_path, expect=2)
    run = only(tmp_path / "runs")
    assert text.startswith("error: cannot write runs/") and text.count("\n") == 1
    command = re.search(r"python app.py (\S+) (--resume)\n", text)
    assert f"The run is in runs/{run.name}." in app(*command.groups(), cwd=tmp_path)
    assert len(history(run)) == 3
    weights = run / "last.safetensors"
    before = content(run)
    for name, arguments in (
        ("net.pt2", ("export", weights, run / "net.pt2")),
        ("mine.yaml", ("copy", QUICKSTART, run / "mine.yaml")),
        ("sweep.csv", ("sweep", QUICKSTART, *TINY[:3], "train.epochs=1,2", f"output={tmp_path}/swept")),
    ):  # fmt: skip
        with full_disk(name):
            text = app(*arguments, cwd=tmp_path, expect=2)
        assert re.fullmatch(rf"error: cannot write \S+{name}: No space left on device; free some space\n", text), text
    assert content(run) == before
    assert list((tmp_path / "swept").glob("*/*/last.safetensors"))  # of runs side by side, one or both were done


def test_a_benchmark(tmp_path):
    recipe, console = load_recipe(QUICKSTART, [f"output={tmp_path}"]), Console(file=io.StringIO())
    plan = [Measurement("inference", 1, [Variant("dense", nullcontext, list)], with_memory=False)]
    for name, left in (("benchmark.json", []), ("benchmark.png", ["benchmark.json"])):
        folder = benchmark_folder(recipe, tmp_path / name)
        with full_disk(name), pytest.raises(WriteError, match=f"^cannot write {folder / name}: No space left"):
            benchmark(recipe, plan, folder, 1, console)
        assert folder.exists() == bool(left) and [path.name for path in tmp_path.glob(f"{name}/*")] == left


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_text_that_cannot_be_printed():
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "app.py"), "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: cannot go on: [Errno 28] No space left on device\n"


def limited(size):
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits of a file's size")
def test_a_limit_of_the_system(app, tmp_path):
    command = [sys.executable, str(ROOT / "app.py"), str(QUICKSTART), *TINY, "train.epochs=1", "output=runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limited(60_000))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^error: cannot write \S+/curves.png: File too large; .*--resume$", done.stderr, re.M)
    run = only(tmp_path / "runs")
    assert "The run is in" in app(run / "recipe.yaml", f"output={tmp_path}/runs", "--resume")
    assert only(tmp_path / "runs") == run and not (run / "state.pt").exists() and len(history(run)) == 1


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif("DGC_FASTAI_TMPFS" not in os.environ, reason="mounts a disk: set DGC_FASTAI_TMPFS=1")
def test_a_small_disk(tmp_path, small_disk):
    keep = ["log.keep_every=1", "train.epochs=6"]
    whole, _ = start([*keep, f"output={tmp_path}/whole"])
    with pytest.raises(WriteError, match="No space left on device; free some space, then go on"):
        start([*keep, f"output={small_disk}"])
    whole_files(only(small_disk))
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    assert same_run(whole, start([*keep, f"output={small_disk}"], resume=True)[0])


# Damaged files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The output folder of a run that was stopped in its second epoch."""
    output = tmp_path_factory.mktemp("stopped")
    assert start([f"output={output}"], callback=StopAt(1, 1))[0] is None
    return output


def refused(read, path):
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value), error.value
    return str(error.value)


def test_states_and_weights_cut_short_or_with_a_wrong_byte(stopped, tmp_path):
    chance = random.Random(0)
    run = only(stopped)
    state, weights = (run / "state.pt").read_bytes(), (run / "last.safetensors").read_bytes()
    path = tmp_path / "damaged"
    for whole, read, message in (
        (state, read_state, "cannot resume from it"), (weights, Predictor.from_weights, "cannot tell its network")
    ):  # fmt: skip
        for length in (0, 1, 8, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(50))):
            path.write_bytes(whole[:length])
            assert message in refused(read, path)
    header = 8 + int.from_bytes(weights[:8], "little")
    for _ in range(50):
        path.write_bytes(other_byte(chance, weights, header))
        try:  # a digit of the seed, a letter of a class: nobody can tell
            assert Predictor.from_weights(path).model.state_dict().keys() == load_file(run / "last.safetensors").keys()
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    # In what a zip file repeats, a byte is free; what is read of it has a checksum.
    known = torch.load(io.BytesIO(state), weights_only=True)["network"]
    for _ in range(50):
        path.write_bytes(other_byte(chance, state, len(state)))
        try:
            network = read_state(path)["network"]
            assert all(torch.equal(network[name], tensor) for name, tensor in known.items())
        except CheckpointError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_a_damaged_state_stops_the_resumption_and_loses_nothing(app, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "runs")
    run = only(tmp_path / "runs")
    whole = run / "state.pt"
    state = torch.load(whole, weights_only=True)
    other = {name: torch.zeros(3) for name in state["network"]}
    for damaged in (
        whole.read_bytes()[:1000],
        {key: value for key, value in state.items() if key != "random"},
        {**state, "network": other},
        {**state, "optimizer": {}},
    ):
        if isinstance(damaged, bytes):
            whole.write_bytes(damaged)
        else:
            torch.save(damaged, whole)
        before = content(run)
        text = app(run / "recipe.yaml", f"output={tmp_path}/runs", "--resume", expect=2)
        assert re.fullmatch(
            rf"error: {whole}: cannot resume from it: .*; move it away, and --resume takes the next older run, or "
            "starts one\n", text
        ), text  # fmt: skip
        assert content(run) == before
    whole.unlink()  # as told
    assert "starting one" in app(run / "recipe.yaml", "train.epochs=1", f"output={tmp_path}/runs", "--resume")


def test_weights_of_another_recipe(app, stopped, tmp_path):
    weights = only(stopped) / "last.safetensors"
    for override, problem in (
        ("model.heads=2", "does not fit DGCDenseNet: "),
        ("model.stages=[1,1,2]", "does not fit DGCDenseNet: "),
        ("model.arch=dgc_densenet86_dense", "holds weights of dgc_densenet86, which do not fit dgc_densenet86_dense"),
    ):
        text = app("evaluate", QUICKSTART, *TINY, override, "--weights", weights, expect=2)
        assert text.startswith(f"error: {weights}: {problem}") and text.count("\n") == 1
    run = shutil.copytree(stopped, tmp_path / "runs")
    text = app(QUICKSTART, *TINY, "model.heads=2", "train.epochs=1", f"output={run}", "--resume")
    assert "was interrupted, too, but differs in model.heads, train.epochs" in text


@pytest.mark.parametrize(
    "metadata",
    [
        {"classes": "3"}, {"classes": "[]"}, {"classes": "{}"}, {"classes": "[1, 2]"}, {"classes": "[" * 100_000},
        {"classes": '["one", "two"]'}, {"recipe": "name: x"}, {"recipe": ""}, {"recipe": "\x00"}, {"recipe": None},
    ],
    ids=lambda metadata: json.dumps(metadata)[:30],
)  # fmt: skip
def test_weights_that_tell_of_no_network(stopped, tmp_path, metadata):
    weights = only(stopped) / "last.safetensors"
    recipe = (only(stopped) / "recipe.yaml").read_text()
    metadata = {"classes": json.dumps(list("0123456789")), "recipe": recipe, **metadata}
    path = tmp_path / "tampered.safetensors"
    save_file(load_file(weights), path, {key: value for key, value in metadata.items() if value is not None})
    refused(Predictor.from_weights, path)
