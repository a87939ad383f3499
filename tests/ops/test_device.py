"""The device of a recipe. What CUDA does is replaced, so that every machine tests it."""

import pytest
import torch

from dgc_fastai.ops.device import select_device, use_device
from dgc_fastai.utils.errors import RecipeError


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that looks as if it had two GPUs; yields the numbers of the devices that were made current."""
    chosen, precision = [], torch.backends.cudnn.conv.fp32_precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield chosen
    torch.backends.cudnn.conv.fp32_precision = precision


@pytest.mark.parametrize("name, number", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_made_ready_by_its_number(two_gpus, name, number):
    assert use_device(name) == torch.device("cuda", number)
    assert two_gpus == [number]
    assert torch.backends.cudnn.benchmark


def test_each_of_several_processes_has_a_gpu_of_its_own(two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert use_device("auto") == torch.device("cuda", 1)
    assert two_gpus == [1]


def test_a_gpu_that_is_not_there_is_an_error_of_one_line(two_gpus, monkeypatch):
    with pytest.raises(RecipeError, match="device: cuda:2, but the highest here is cuda:1; use one that exists"):
        use_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(RecipeError, match="device: cuda:3, .* as many processes as there are GPUs"):
        use_device("auto")
    assert not two_gpus


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")
    with pytest.raises(RecipeError, match="device: cuda, but this installation of torch cannot use CUDA"):
        select_device("cuda")
