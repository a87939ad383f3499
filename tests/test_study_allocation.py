"""The study of allocations: every way to choose gate factors comes to the same cost."""

import importlib.util
from copy import deepcopy

import pytest
import torch

from dgc_fastai import budget, convert
from helpers import ROOT


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_of_allocations", ROOT / "recipes/study/allocation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_meets_the_target(study):
    torch.manual_seed(0)
    dense, images = study.network(5), torch.rand(4, *study.INPUT)
    found = {name: method(dense, 0.5, images) for name, method in study.METHODS.items()}
    assert isinstance(found["one"], float) and len(found["chosen"]) == 20
    for factors in found.values():
        cost = budget(convert(deepcopy(dense), gate_factor=factors, input_size=study.INPUT), study.INPUT)
        assert cost.macs / cost.macs_dense == pytest.approx(0.5, abs=0.005)
