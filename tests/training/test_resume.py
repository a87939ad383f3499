"""Runs that are stopped, or killed, and go on to the same bits."""

import csv
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file

from dgc_fastai import load_recipe
from dgc_fastai.data import image_files
from dgc_fastai.training import state_file
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.training.run_folder import as_begun, find_resumable_run, interrupted_run
from dgc_fastai.training.state_file import read_state
from dgc_fastai.utils.errors import CheckpointError, RecipeError, TrainingError
from dgc_fastai.utils.files import file_lock
from helpers import QUICKSTART, ROOT
from helpers.datasets import write_imagenet
from helpers.golden import equal_states
from helpers.runs import TINY, StopAt, history, same_run, silent, start, whole_files

EVERYTHING = [
    "train.ema=0.9", "train.accumulate=3", "train.clip=1.0", "train.mixup=0.2", "train.cutmix=1.0",
    "train.label_smoothing=0.1", "train.optimizer=sgd", "train.lr=0.05", "train.schedule=multistep",
    "train.warmup=0.5", "train.decay_norms=false", "model.drop_rate=0.2", "log.keep_every=2",
    "data.augment=[crop_flip, trivial_augment, random_erasing]",
]  # fmt: skip


@pytest.mark.parametrize("overrides", [[], EVERYTHING], ids=["plain", "everything"])
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, overrides):
    whole, _ = start([*overrides, f"output={tmp_path}/whole"])
    # After the first step; in the epoch that was gone on with; in a validation; at an epoch's last batch; in the next.
    places = [StopAt(0, 0), StopAt(0, 2), StopAt(0, 1, training=False), StopAt(1, 4), StopAt(2, 2)]
    for number, place in enumerate(places):
        folder, learn = start([*overrides, f"output={tmp_path}/parts"], resume=number > 0, callback=place)
        assert folder is None
        (path,) = (tmp_path / "parts").glob("*/state.pt")
        state = read_state(path)
        epoch, batch, training = place.place
        assert (state["epoch"], state["batch"]) == (epoch, batch + 1 if training else 5)
    parts, learn = start([*overrides, f"output={tmp_path}/parts"], resume=True)
    assert same_run(whole, parts)
    # Whoever goes on with the learner has the weights that were reported.
    assert equal_states(learn.model.state_dict(), load_file(parts / "last.safetensors"))


def test_image_files_too_and_whatever_the_number_of_workers(tmp_path):
    write_imagenet(tmp_path / "images")
    overrides = [
        "data.name=folder", f"data.path={tmp_path}/images", "data.size=16", "data.batch_size=5", "train.epochs=2",
        "data.augment=[crop_flip, rand_augment, random_erasing]",
    ]  # fmt: skip
    whole, _ = start([*overrides, f"output={tmp_path}/whole"])
    folder, _ = start([*overrides, f"output={tmp_path}/parts", "data.workers=2"], callback=StopAt(1, 0))
    assert folder is None
    parts, _ = start([*overrides, f"output={tmp_path}/parts", "data.workers=2"], resume=True)
    assert same_run(whole, parts)


def test_image_files_prepared_in_advance_too(tmp_path, monkeypatch, request):
    monkeypatch.setattr(image_files, "RESIZING_DEVICES", ("cpu",))
    write_imagenet(tmp_path / "images")
    overrides = [
        "data.name=folder", f"data.path={tmp_path}/images", "data.size=16", "data.batch_size=5", "train.epochs=2",
        "data.augment=[crop_flip, random_erasing]", "model.drop_rate=0.2",
    ]  # fmt: skip
    whole, _ = start([*overrides, f"output={tmp_path}/whole"])
    request.getfixturevalue("streams")
    folder, _ = start([*overrides, f"output={tmp_path}/parts"], callback=StopAt(0, 1))
    assert folder is None
    parts, _ = start([*overrides, f"output={tmp_path}/parts"], resume=True)
    assert same_run(whole, parts)


def test_two_runs_of_a_recipe_are_the_same_and_its_resolved_form_reruns_it(tmp_path):
    first, _ = start([f"output={tmp_path}/first", "model.drop_rate=0.1"])
    recipe = load_recipe(first / "recipe.yaml", [f"output={tmp_path}/second"])
    assert (recipe.train.precision, recipe.train.channels_last) == ("float32", False)  # what auto is on a CPU
    second = TrainingRun(recipe).fit(silent())
    assert same_run(first, second)
    third, _ = start([f"output={tmp_path}/third", "model.drop_rate=0.1", "train.seed=1"])
    assert not equal_states(load_file(first / "last.safetensors"), load_file(third / "last.safetensors"))


# Killed ---------------------------------------------------------------------------------------------------

EPOCHS = 16
KILLED = ["train.ema=0.9", f"train.epochs={EPOCHS}", "data.batch_size=700", "data.augment=[crop_flip, random_erasing]"]


class Tell(Callback):
    def __init__(self, event):
        self.event = event

    def before_train(self):
        self.event.set()


def child(output, training, kill_at_write):
    """Start or go on with a run; SIGKILL this process at its nth write, with half of the file written."""
    writes, fsync = 0, os.fsync

    def fsync_or_die(handle):
        nonlocal writes
        writes += 1
        if writes == kill_at_write:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = fsync_or_die
    resume = bool(list(output.glob("*/state.pt")))
    start([*KILLED, f"output={output}"], resume, Tell(training))


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_a_run_killed_at_ten_moments_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests")])
    )  # where the server finds this file
    # Children are forked from a server that has imported everything and computed nothing: no child waits for torch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo", "matplotlib.backends.backend_agg"])

    def run(output, kill_at_write=0, kill_after=None):
        training = context.Event()
        process = context.Process(target=child, args=(output, training, kill_at_write))
        process.start()
        if kill_after is not None:
            assert training.wait(120)
            process.join(kill_after)
            process.kill()
        process.join(120)
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    (whole,) = (tmp_path / "whole").iterdir()
    epoch = sum(float(row["seconds"]) for row in csv.DictReader(open(whole / "history.csv"))) / EPOCHS
    chance = random.Random(0)
    # Five within a file, of some six an epoch; five at any time. Together they cannot reach the end of the run.
    moments = [dict(kill_at_write=chance.randint(3, 9)) for _ in range(5)]
    moments += [dict(kill_after=chance.uniform(0, 1.5 * epoch)) for _ in range(5)]
    chance.shuffle(moments)
    for moment in moments:
        assert run(tmp_path / "parts", **moment) == -signal.SIGKILL
        (folder,) = (tmp_path / "parts").iterdir()
        whole_files(folder)
    assert 0 < read_state(folder / "state.pt")["epoch"] < EPOCHS
    assert run(tmp_path / "parts") == 0
    assert same_run(whole, folder)


# Which run ------------------------------------------------------------------------------------------------


def test_the_newest_interrupted_run_of_the_recipe_is_found(tmp_path):
    output = f"output={tmp_path}"
    recipe = load_recipe(QUICKSTART, [*TINY, output])
    folder, told = interrupted_run(recipe)
    assert folder is None and told == f"No interrupted run of this recipe below {tmp_path}: starting one."
    start([output, "train.seed=7"], callback=StopAt(0, 0))
    folder, told = interrupted_run(recipe)
    assert folder is None and "was interrupted, too, but differs in train.seed" in told
    start([output], callback=StopAt(0, 0))
    start([output], callback=StopAt(0, 1))
    states = {path.parent: read_state(path) for path in tmp_path.glob("*/state.pt")}
    folder, _ = interrupted_run(recipe)
    assert len(states) == 3 and states[folder]["batch"] == 2
    # Where and what is logged is no difference; what is going on in another process is not interrupted.
    assert interrupted_run(load_recipe(QUICKSTART, [*TINY, output, "log.print_every=3"]))[0] == folder
    with file_lock(folder / "recipe.yaml"):
        older, _ = interrupted_run(recipe)
        assert states[older]["batch"] == 1
        with file_lock(older / "recipe.yaml"):
            none, told = interrupted_run(recipe)
            assert none is None and "is going on in another process" in told
    done, _ = start([output], resume=True)
    assert done == folder and interrupted_run(recipe)[0] == older


def test_a_damaged_state_is_named(tmp_path):
    start([f"output={tmp_path}"], callback=StopAt(0, 0))
    (path,) = tmp_path.glob("*/state.pt")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="state.pt: cannot resume from it"):
            start([f"output={tmp_path}"], resume=True)
    torch.save({"format": 0}, path)
    with pytest.raises(CheckpointError, match="another version wrote it .format 0; this one reads 3"):
        read_state(path)
    torch.save({"format": 3, "code": Path}, path)
    with pytest.raises(CheckpointError, match="cannot resume from it"):
        read_state(path)


def test_every_nth_epoch_is_kept(tmp_path):
    folder, _ = start([f"output={tmp_path}", "log.keep_every=2", "train.epochs=5"])
    assert [path.name for path in sorted(folder.glob("epoch_*"))] == [
        "epoch_0002.safetensors",
        "epoch_0004.safetensors",
    ]
    kept = load_file(folder / "epoch_0004.safetensors")
    assert kept.keys() == load_file(folder / "last.safetensors").keys()


def test_a_run_whose_loss_is_nan_names_what_is_left(tmp_path):
    class NonFinite(Callback):
        order = 4

        def after_loss(self):
            if self.training and self.epoch == 1:
                self.learn.loss = self.learn.loss * float("nan")

    with pytest.raises(TrainingError) as error:
        start([f"output={tmp_path}"], callback=NonFinite())
    (folder,) = tmp_path.iterdir()
    assert "step 6 (epoch 2, batch 1)" in str(error.value)
    assert f"the last good weights are {folder / 'last.safetensors'}, of epoch 1" in str(error.value)
    assert f"all names are in {folder / 'nonfinite.txt'}" in str(error.value)
    names = (folder / "nonfinite.txt").read_text().split()
    assert len(set(names)) == 300 and set(map(int, names)) <= set(range(1437))
    assert len(history(folder)) == 1 and load_file(folder / "last.safetensors")


def test_after_a_restart_a_launch_finds_the_run_that_it_had_taken(tmp_path, monkeypatch):
    output = f"output={tmp_path}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    start([output], callback=StopAt(0, 2))
    (folder,) = tmp_path.iterdir()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    start([output], resume=True, callback=StopAt(1, 2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    recipe = load_recipe(QUICKSTART, [*TINY, output])
    assert find_resumable_run(recipe, resume=False)[0] == folder  # though it was the first that made it
    other = load_recipe(QUICKSTART, [*TINY, output, "train.seed=1"])
    assert find_resumable_run(other, resume=False)[0] is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "third")
    assert find_resumable_run(recipe, resume=False)[0] is None


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch):
    folder, _ = start(["train.precision=bf16", f"output={tmp_path}"], callback=StopAt(0, 1))
    assert folder is None
    recipe = load_recipe(QUICKSTART, [*TINY, f"output={tmp_path}"])
    assert recipe.train.precision == "auto"  # float32 on this device
    begun, found = interrupted_run(recipe)
    assert begun and found.startswith("Going on with")
    goes_on = as_begun(recipe, begun)
    assert (goes_on.train.precision, goes_on.train.channels_last) == ("bf16", False)
    assert as_begun(recipe, None) == recipe
    other = load_recipe(QUICKSTART, [*TINY, f"output={tmp_path}", "train.precision=float32"])
    assert interrupted_run(other)[0] is None and as_begun(other, begun).train.precision == "float32"
    # On a GPU that does not compute in it, the run is refused.
    monkeypatch.setattr("dgc_fastai.training.run.use_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(RecipeError, match="train.precision: bf16, but Some GPU has no bf16 units"):
        TrainingRun(goes_on)


def test_a_run_on_the_cpu_leaves_a_gpu_alone(monkeypatch):
    def begin(*_):
        raise AssertionError("a GPU was used")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", begin)
    monkeypatch.setattr(torch.cuda, "set_rng_state", begin)
    state = state_file._random_state()
    assert state["cuda"] is None
    state_file.restore_random_state({"random": [{**state, "cuda": torch.zeros(16, dtype=torch.uint8)}]})
