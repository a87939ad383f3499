"""The README's promises: its code runs, its commands are CI's, its layout is the package's."""

import re

import torch

from dgc_fastai.layers.gate_schedule import dgc_layers
from helpers import ROOT
from helpers.datasets import write_imagenet

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    write_imagenet(tmp_path, classes=("cat", "dog"), train=12, valid=1)
    (tmp_path / "train").rename(tmp_path / "pictures")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    timm_example, fastai_example, convert_example, loop, inference, notebook = blocks("python")
    names = {}
    exec(timm_example, names)
    assert names["model"].training and sum(p.numel() for p in names["model"].parameters()) == 12_335_144
    # The example's network is published-size: fewer layers here, and the rest as it stands.
    fastai_example = fastai_example.replace('"dgc_densenet86",', '"dgc_densenet86", stages=(1, 1, 1),')
    exec(fastai_example, names := {})
    learn = names["learn"]
    assert learn.recorder.metric_names[-4:] == ["inactive", "lasso", "lr", "time"]
    assert learn.recorder.values[-1][-3] == 0.75
    exec(convert_example, {})
    assert re.search(r"\d+ of 1814 M multiply-accumulates\n", capsys.readouterr().out)
    exec(loop, looped := {})
    assert looped["loss"].isfinite() and dgc_layers(looped["model"])[0].inactive_channels == 12
    exec(inference, {})
    assert "torch.Size([1, 10])" in capsys.readouterr().out and (tmp_path / "net.safetensors").exists()
    exec(notebook.replace("16, 1e-2", "1, 1e-2, cbs=[ShortEpochCallback(0.1)]"), names)
    assert torch.isfinite(torch.tensor(names["learn"].recorder.losses)).all()


def test_ci_runs_the_readme_s_test_command():
    install_and_run, install_and_test, *_ = (block.strip() for block in blocks("bash"))
    assert "app.py recipes/quickstart.yaml" in install_and_run
    assert install_and_test in (ROOT / ".ci/run").read_text().splitlines()
