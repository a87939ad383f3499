"""The command env."""

import io
import json

import pytest
import torch
from rich.console import Console

from dgc_fastai.analysis import environment
from dgc_fastai.analysis.environment import describe_environment
from dgc_fastai.cli.environment import show_environment
from helpers.fake_gpu import fake_gpu

SECTIONS = ["versions", "processor", "C++ kernel", "GPU", "training", "space"]


def shown(facts, width):
    console = Console(file=io.StringIO(), width=width)
    show_environment(console, facts)
    return console.file.getvalue()


def test_env_is_one_screen_and_json(app):
    facts = json.loads(app("env", "--json"))
    if not torch.cuda.is_available():
        assert list(facts) == SECTIONS and facts["GPU"]["found"].startswith("none")
        assert facts["training"] == {"device": "cpu", "precision": "float32", "memory format": "channels-first"}
    assert facts["versions"]["torch"] == torch.__version__
    text = app("env")
    assert len(text.splitlines()) < 40
    assert all(section in text for section in facts) and facts["processor"]["name"] in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_env_keeps_every_word_at_any_width(width):
    facts = describe_environment()
    text = shown(facts, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    compact = "".join(text.split())
    for name, value in facts["versions"].items():
        assert value is None or (name in text and "".join(value.split()) in compact)


def test_env_tells_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with fake_gpu((8, 6)):
        facts = describe_environment()
        device = torch.device("cuda", 0)
        file = environment.cache_file(device)
        file.parent.mkdir()
        layers = {str(number): {"backend": name} for number, name in enumerate(["triton", "triton", "scaled_inputs"])}
        file.write_text(json.dumps({"layers": layers}))
        later = describe_environment()
    gpu = facts["GPU 0"]
    assert gpu["memory"] == "80.0 GiB, 70.0 GiB free" and gpu["capability"] == "8.6"
    assert gpu["fast types"] == ["fp16", "bf16", "TF32"] and gpu["measured"] == "no layer yet"
    assert later["GPU 0"]["measured"] == "fastest of 3 layers: triton in 2, scaled_inputs in 1"
    assert facts["training"] == {"device": "cuda:0", "precision": "bf16", "memory format": "channels-last"}


def test_a_fact_that_is_missing_hides_no_other(monkeypatch):
    def missing(*_, **__):
        raise OSError("not here")

    for name in ("Path.read_text", "subprocess.run", "shutil.disk_usage", "processor_name", "compiler_commands"):
        monkeypatch.setattr(f"dgc_fastai.analysis.environment.{name}", missing)
    facts = describe_environment()
    assert facts["processor"]["name"] is None and facts["space"]["free memory"] is None
    assert facts["C++ kernel"]["compiler"] == "not here" and facts["versions"]["python"]
    assert "name" not in shown({"processor": facts["processor"]}, 80)
