"""Several processes do what one does, and survive what happens to one of them."""

import csv
import fcntl
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from dgc_fastai import load_recipe
from dgc_fastai.cli import main as app
from dgc_fastai.data import image_files
from dgc_fastai.data.image_files import FileDL
from dgc_fastai.ops import build, kernel
from dgc_fastai.training import collectives
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.utils.errors import LostProcess
from helpers import ROOT, processes
from helpers.datasets import write_fashion_mnist, write_imagenet
from helpers.golden import equal_states
from helpers.runs import silent

TINY = ["model.stages=[1,1,1]", "model.growth=[4,4,4]", "data.batch_size=300", "train.epochs=3"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]  # and how many
EPOCHS = 60  # more than can be trained before the last kill
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}


# 1,437 images: the last batch of an epoch has one image, and one of two processes none; or it has 37.
PLAIN = ["train.epochs=3", "data.augment=[]", "train.optimizer=sgd", "train.lr=0.1"]
SCENARIOS = {
    "plain": ("plain", [*PLAIN, "data.batch_size=718"]),
    "plain_more": ("plain", [*PLAIN, "data.batch_size=200", "train.accumulate=2", "train.clip=0.05", "train.ema=0.9"]),
    "taught": ("taught", [*PLAIN, "data.batch_size=718", "train.teacher_weight=0.9", "train.teacher_temperature=1.0"]),
    "real": ("train", [*TINY, "train.epochs=6", "data.batch_size=100"]),
    "validate": ("validate", [*TINY, "data.name=fashion_mnist", "data.path=FOLDER/data", "data.batch_size=48"]),
    "undisturbed": ("run", [*TINY, "train.ema=0.9", "model.drop_rate=0.2", "output=FOLDER/undisturbed"]),
    "stopped": ("stop", [*TINY, "train.ema=0.9", "model.drop_rate=0.2", "output=FOLDER/stopped"]),
    "resumed": ("resume", [*TINY, "train.ema=0.9", "model.drop_rate=0.2", "output=FOLDER/stopped"]),
    "non_finite": ("non_finite", [*TINY, "data.augment=[]"]),
    "non_finite_skipped": ("non_finite", [*TINY, "data.augment=[]", "train.nonfinite=skip"]),
}


@pytest.fixture(scope="session")
def outcome(tmp_path_factory):
    """A function: what each of so many processes has kept of a scenario.

    A launch takes long, so two processes go through all scenarios, and for all workers of pytest.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    folder.mkdir(exist_ok=True)

    def scenarios(names):
        chosen = ((name, *SCENARIOS[name]) for name in names)
        return json.dumps([[name, what, [one.replace("FOLDER", str(folder)) for one in o]] for name, what, o in chosen])

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "data").exists():
            write_fashion_mnist(folder / "data", n=1001)
            for count, names in ((2, list(SCENARIOS)), (3, ["validate"])):
                command = [*TORCHRUN, str(count), ROOT / "tests/helpers/processes.py", folder, scenarios(names)]
                done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
                assert done.returncode == 0, done.stderr

    def get(name, count):
        if count == 1:  # is this process
            processes.main(folder, scenarios([name]))
        return [torch.load(folder / f"{name}-{count}-{rank}.pt") for rank in range(count)]

    return get


@pytest.mark.parametrize("name", ["plain", "plain_more", "taught"])
def test_two_processes_train_as_one_does(outcome, name):
    (one,), two = outcome(name, 1), outcome(name, 2)
    torch.manual_seed(0)
    before = processes.without_norm_layers().state_dict()
    moved = [(one["weights"][name] - before[name]).abs().max() for name in before]
    assert max(moved) > 0.01  # there was something to disagree about
    for other in two:
        assert other["inactive"] == one["inactive"] and one["inactive"][-1] == [12, 24]
        for name, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(other["history"]), torch.tensor(one["history"]), rtol=0, atol=1e-4)
        assert other["scores"] == pytest.approx(one["scores"], abs=1e-5)


def test_two_processes_train_the_real_network_alike(outcome):
    (one,), two = outcome("real", 1), outcome("real", 2)
    assert two[0]["inactive"] == two[1]["inactive"] == one["inactive"]
    assert two[0]["history"] == two[1]["history"] and two[0]["scores"] == two[1]["scores"]
    assert equal_states(two[0]["weights"], two[1]["weights"])  # norms' statistics, too
    assert two[0]["history"][-1][0] == pytest.approx(one["history"][-1][0], abs=0.1)


def test_every_validation_image_counts_once(outcome):
    (one,) = outcome("validate", 1)
    right = one["scores"]["top_1"] * 1001, one["scores"]["top_5"] * 1001
    assert right == pytest.approx([round(count) for count in right], abs=1e-3)
    for other in (*outcome("validate", 2), *outcome("validate", 3)):
        for name, number in zip(("top_1", "top_5"), right):
            assert round(other["scores"][name] * 1001) == round(number)
        assert other["scores"]["loss"] == pytest.approx(one["scores"]["loss"], abs=1e-5)


def test_a_run_of_two_processes_that_is_stopped_goes_on_to_the_same_bits(outcome):
    undisturbed, resumed = outcome("undisturbed", 2), outcome("resumed", 2)
    assert all("in epoch 2 of 3, after 2 of 5 batches" in one["stopped"] for one in outcome("stopped", 2))
    assert resumed[0]["folder"] == resumed[1]["folder"]
    for one, other in zip(undisturbed, resumed):
        for name, weight in one["weights"].items():
            # The average over processes of what their norms have seen is rounded once more.
            torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=1e-6 * ("running" in name))
    rows = [list(csv.DictReader(open(Path(one[0]["folder"]) / "history.csv"))) for one in (undisturbed, resumed)]
    assert [row["epoch"] for row in rows[1]] == ["1", "2", "3"]
    for row, other in zip(*rows):
        del row["seconds"], other["seconds"]
        assert {key: float(value) for key, value in row.items()} == pytest.approx(
            {key: float(value) for key, value in other.items()}, rel=1e-5
        )


def test_a_nan_loss_in_one_of_two_processes(outcome):
    stopped, skipped = outcome("non_finite", 2), outcome("non_finite_skipped", 2)
    assert stopped[0] == stopped[1]
    assert "the loss is nan at step 2 (epoch 1, batch 2), of the images" in stopped[0]["error"]
    assert "and 147 more" in stopped[0]["error"]  # of the one process's 150
    assert equal_states(skipped[0]["weights"], skipped[1]["weights"])
    assert all(tensor.isfinite().all() for tensor in skipped[0]["weights"].values())
    assert torch.tensor(skipped[0]["history"]).isfinite().all()


class Launch:
    """app.py under torchrun, its output in a file."""

    def __init__(self, folder, *options, restarts=0, torchrun=(*TORCHRUN, "2"), name="log"):
        self.log = folder / name
        command = [*torchrun, "--max-restarts", str(restarts), ROOT / "app.py", "recipes/quickstart.yaml"]
        with open(self.log, "w") as log:
            arguments = [*command, *TINY, f"output={folder}", *options]
            self.process = subprocess.Popen(arguments, env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=log)

    def wait_for(self, text):
        until = time.monotonic() + 120
        while not re.search(text, self.log.read_text()):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def workers(self):
        listing = subprocess.run(["ps", "-o", "pid=,ppid=", "-A"], capture_output=True, text=True).stdout
        pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
        return sorted(pid for pid, parent in pairs if parent == self.process.pid and pid != self.process.pid)


def test_killed_processes_lead_to_a_resumed_run(tmp_path):
    chance, kills = random.Random(0), 3
    launch = Launch(tmp_path, f"train.epochs={EPOCHS}", restarts=kills)
    for number in range(1, kills + 1):
        launch.wait_for(rf"(?s)(train loss.*){{{number}}}")
        time.sleep(chance.uniform(0, 2))
        os.kill(chance.choice(launch.workers()), signal.SIGKILL)
    assert launch.process.wait(timeout=200) == 0, launch.log.read_text()
    log = launch.log.read_text()
    assert log.count("The run is in") == 1 and "Traceback" not in log
    assert log.count("A process has died, and all were started again") == kills
    assert_complete(tmp_path, EPOCHS)


def assert_complete(folder, epochs):
    (history,) = folder.glob("*/history.csv")
    assert [int(row["epoch"]) for row in csv.DictReader(open(history))] == list(range(1, epochs + 1))
    assert not list(folder.glob("*/state.pt")) and not list(folder.glob("*/.*.partial"))


def test_two_launchers_as_on_two_machines(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "run"
    torchrun = [*TORCHRUN[:3], "--nnodes", "2", "--nproc_per_node", "1", *where]
    first, second = (
        Launch(tmp_path, "train.epochs=8", restarts=2, torchrun=torchrun, name=name) for name in ("log1", "log2")
    )
    until = time.monotonic() + 120
    while "top-1" not in first.log.read_text() + second.log.read_text():
        assert time.monotonic() < until, first.log.read_text() + second.log.read_text()
        time.sleep(0.02)
    os.kill(
        second.workers()[0], signal.SIGKILL
    )  # which of the two launchers counts this as a restart is its own affair
    assert (first.process.wait(timeout=200), second.process.wait(timeout=30)) == (0, 0), first.log.read_text()
    log = first.log.read_text() + second.log.read_text()
    assert log.count("The run is in") == 1 and log.count("all were started again") >= 1
    assert_complete(tmp_path, epochs=8)


def test_a_dead_process_ends_all_with_one_message(tmp_path):
    launch = Launch(tmp_path, "train.epochs=500")
    launch.wait_for(r"\n +2 ")
    began = time.monotonic()
    os.kill(launch.workers()[0], signal.SIGKILL)
    assert launch.process.wait(timeout=60) != 0 and time.monotonic() - began < 60
    ours = launch.log.read_text().split("closing signal")[0]
    errors = re.findall("error: .*", ours)
    assert len(errors) == 1 and "another process of this run has died" in errors[0] and "--resume" in errors[0]


@pytest.mark.parametrize(
    "arguments, environment, answer",
    [
        (["data.batch_size=63"], {}, "63 images cannot be divided evenly among 2 processes"),
        (["device=cuda:1"], {}, "is one device, for 2 processes"),
        (["train.precision=bf16"], {"ACCELERATE_MIXED_PRECISION": "fp16"}, "configured for mixed precision fp16"),
        (["train.precision=float32"], {"ACCELERATE_MIXED_PRECISION": "bf16"}, "set it in the recipe only"),
        ([], {"ACCELERATE_USE_FSDP": "true"}, "accelerate is configured for FSDP"),
        ([], {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "accelerate is configured to compile with INDUCTOR"),
    ],
    ids=["batch size", "one device", "precision of both", "precision of accelerate", "FSDP", "dynamo"],
)
def test_what_cannot_be_shared_is_refused(monkeypatch, capsys, arguments, environment, answer):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["app.py", str(ROOT / "recipes/quickstart.yaml"), *arguments])
    assert app.main() == 2
    assert answer in capsys.readouterr().err


def test_only_the_main_process_warns_that_the_kernel_is_built():
    parent, loggers = logging.getLogger("dgc_fastai.ops"), (build.log, kernel.log)
    before = parent.level
    try:
        assert all(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        with warnings.catch_warnings():
            collectives.mute_repeated_warnings()
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        # Every process reads images of its own, so it warns of those.
        assert logging.getLogger(image_files.__name__).isEnabledFor(logging.WARNING)
    finally:
        parent.setLevel(before)


def test_commands_for_one_process_refuse_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["app.py", "sweep", str(ROOT / "recipes/quickstart.yaml"), "train.epochs=1,2"])
    assert app.main() == 2
    assert "sweep runs in one process, and 2 were started" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")  # the other one leaves the telling to the first
    monkeypatch.delitem(sys.modules, "dgc_fastai.training.collectives", raising=False)
    assert app.main() == 2
    assert not capsys.readouterr().err


def test_accelerate_launches_it(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    arguments = ["app.py", "recipes/quickstart.yaml", *TINY, "train.epochs=1", f"output={tmp_path}"]
    done = subprocess.run([*command, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "The run is in" in done.stdout, done.stderr


def test_a_dead_reader_of_images_is_one_line(tmp_path, monkeypatch):
    def killed(loader, index):
        os.kill(os.getpid(), signal.SIGKILL) if torch.utils.data.get_worker_info() else None
        return original(loader, index)

    original = FileDL.do_item
    monkeypatch.setattr(FileDL, "do_item", killed)
    write_imagenet(tmp_path / "data")
    data = "data.name=imagenet", f"data.path={tmp_path / 'data'}", "data.size=32", "data.batch_size=4", "data.workers=1"
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [*TINY, *data, f"output={tmp_path / 'runs'}"])
    with pytest.raises(LostProcess, match="a process that reads images has died.*to go on: dgc .*--resume"):
        TrainingRun(recipe).fit(silent())
