"""compress: the network before, the network after, and the answer; stopped, resumed, refused."""

import json
import re
import signal

import pytest
import timm
import torch

from dgc_fastai import convert, save_checkpoint
from dgc_fastai.analysis import compression
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.utils import timing
from dgc_fastai.utils.errors import Interrupted
from helpers.command_line import only

TEXT = """
name: r
model: {arch: test_resnet, convert: {heads: 4, gate_factor: 0.5}}
data: {name: digits, size: 16, batch_size: 400, augment: []}
train: {epochs: 1, lr: 0.01, teacher: before}
log: {report: false}
"""


@pytest.fixture
def compress(app, tmp_path, monkeypatch):
    """The command in a folder with a recipe, quickly timed."""
    monkeypatch.setattr(compression, "ROUNDS", 1)
    monkeypatch.setattr(timing, "MIN_SECONDS", 1e-6)
    monkeypatch.setattr(compression, "runtime_calls", lambda *arguments: ([], []))
    (tmp_path / "r.yaml").write_text(TEXT)
    return lambda *words, **keywords: app("compress", "r.yaml", *words, cwd=tmp_path, **keywords)


@pytest.fixture
def fits(monkeypatch):
    """The names of the runs that were trained."""
    names = []

    def fit(run, *arguments, original=TrainingRun.fit):
        names.append(run.recipe.name)
        return original(run, *arguments)

    monkeypatch.setattr(TrainingRun, "fit", fit)
    return names


def dense_weights(path, gates=False):
    torch.manual_seed(3)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    save_checkpoint(convert(network, input_size=(1, 16, 16)) if gates else network, path)
    return f"model.weights={path}"


def found_in(folder):
    return json.loads((folder / "summary.json").read_text())["compression"]


def test_a_network_that_has_to_be_trained_first(compress, fits, tmp_path):
    text = compress()
    assert fits == ["r-before", "r"]
    before, after = sorted((tmp_path / "runs").iterdir(), key=lambda path: "before" not in path.name)
    found, trained = found_in(after), json.loads((before / "summary.json").read_text())
    assert found["before"]["top_1"] == pytest.approx(trained["best"]["top_1"])
    assert found["before"]["epochs"] == 1 and found["before"]["macs"] == trained["macs"] == trained["macs_dense"]
    summary = json.loads((after / "summary.json").read_text())
    assert found["after"]["top_1"] == summary["best"]["top_1"] and found["after"]["macs"] == summary["macs"]
    assert summary["starts_from"] == f"runs/{before.name}/best.safetensors"
    assert re.search(r"^test_resnet, [\d.]+ % at [\d.]+ ms, became a network of [\d.]+ % at [\d.]+ ms\.$", text, re.M)
    assert re.search(r"^To deploy: runs/r-\d+-\d+/best.safetensors$", text, re.M)
    # Another cut takes the same dense network.
    text = compress("model.convert.gate_factor=0.25", "-q")
    assert fits == ["r-before", "r", "r"] and len(list((tmp_path / "runs").iterdir())) == 3
    assert "epoch" not in text.splitlines()[0] and "became a network" in text


def test_weights_of_the_whole_network_are_the_one_before(compress, fits, tmp_path):
    text = compress(dense_weights(tmp_path / "w.safetensors"))
    assert fits == ["r"] and "The dense network was given, and the compressed one for 1 epoch more" in text
    folder = only(tmp_path / "runs")
    assert found_in(folder)["before"]["epochs"] == 0
    # What is finished is measured again, and not trained.
    (folder / "summary.json").write_text(
        json.dumps({**json.loads((folder / "summary.json").read_text()), "compression": None})
    )
    text = compress(f"model.weights={tmp_path}/w.safetensors", "--resume")
    assert fits == ["r"] and f"runs/{folder.name} is trained already" in text and found_in(folder)["speed"]["rows"]


@pytest.mark.parametrize("stopped", ["r-before", "r"])
def test_what_was_stopped_goes_on(compress, fits, tmp_path, monkeypatch, stopped):
    def stop(run, console, folder=None, original=TrainingRun.fit):
        if run.recipe.name == stopped:
            run.learner.add_cb(StopAt(0, 1))
        return original(run, console, folder)

    from helpers.runs import StopAt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "fit", stop)
        code, message = compress(expect=None)
    assert code == 128 + signal.SIGTERM
    assert re.search(r"saved; to go on: python \S*app.py compress r.yaml --resume$", message.strip())
    compress("--resume")
    assert len(list((tmp_path / "runs").iterdir())) == 2 and not list(tmp_path.glob("runs/*/state.pt"))


def test_an_interrupt_while_measuring_says_how_to_go_on(compress, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(compression, "measure_speed", interrupted)
    code, message = compress(dense_weights(tmp_path / "my weights"), expect=None)
    assert code == 130 and message.strip().endswith(f"compress r.yaml 'model.weights={tmp_path}/my weights' --resume")
    assert "compression" not in json.loads((only(tmp_path / "runs") / "summary.json").read_text())


REFUSED = {
    "nothing to convert": (["model.convert=null", "train.teacher=null"], "nothing to compress without it; set it"),
    "no weights": (["model.weights=none.pth"], "there is no file none.pth"),
    "unknown key": (["model.convert.hads=2"], "did you mean"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_mistakes_are_one_line(compress, tmp_path, words, message):
    answer = compress(*words, expect=2)
    assert message in answer and len(answer.strip().splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_a_network_with_gates_is_refused(compress, tmp_path):
    answer = compress(dense_weights(tmp_path / "w.safetensors", gates=True), expect=2)
    assert "w.safetensors is of a network with gates" in answer and len(answer.strip().splitlines()) == 1


def test_interrupted_is_what_the_message_is_made_of():
    with pytest.raises(Interrupted, match="stopped; to go on: .* compress my.yaml a=1 --resume"):
        from dgc_fastai.cli.compress import _resumable

        with _resumable("my.yaml", ("a=1",)):
            raise Interrupted("stopped; to go on: other", signal.SIGINT)
