"""The study of compressed networks: halved is halved, and its page shows what its table holds."""

import csv
import importlib.util
import sys

import pytest
import timm

from dgc_fastai import budget, convert
from helpers import ROOT


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_of_compression", ROOT / "recipes/study/compress.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_gate_factor_is_the_largest_that_halves_the_cost(study, monkeypatch):
    monkeypatch.setattr(study, "SIZE", (3, 64, 64))
    network = timm.create_model("test_resnet")
    dense, factor = budget(network, study.SIZE).macs, study.halving_gate_factor(network)

    def share(factor):
        converted = convert(timm.create_model("test_resnet"), 4, factor, input_size=study.SIZE)
        return budget(converted, study.SIZE).macs / dense

    assert share(factor) <= 0.5 < share(factor + 0.01)
    monkeypatch.setattr(study, "SHARE", 0.01)
    with pytest.raises(ValueError, match="cannot be halved"):
        study.halving_gate_factor(network)


@pytest.mark.skipif(not importlib.util.find_spec("torch_pruning"), reason="needs Torch-Pruning")
def test_the_rival_costs_as_much(study, monkeypatch):
    monkeypatch.setattr(study, "SIZE", (3, 64, 64))
    network = timm.create_model("test_resnet", num_classes=10)
    dense = budget(network, study.SIZE).macs
    pruned, share = study.prune(network, dense // 2)
    cost = budget(pruned, study.SIZE)
    assert 0.3 * dense < cost.macs <= dense // 2 and cost.output == (10,) and 0 < share < 1
    assert budget(network, study.SIZE).macs == dense


def test_the_page_shows_the_table(study):
    with open(ROOT / "docs/study/compress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs/compress.md").read_text()
    assert rows and study.markdown(rows) in page
    assert all(row["converted"] in ("", *(one["top_1"] for one in rows)) or "pruned" in row["variant"] for row in rows)
