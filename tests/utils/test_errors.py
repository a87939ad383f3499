"""Errors in one line."""

import pytest
import torch

from dgc_fastai.cli import main as cli
from dgc_fastai.utils.errors import out_of_memory

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.12 GiB is "
    "free.\nProcess 1 has 14 GiB memory in use."
)
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB). Tried to allocate 256 bytes on private pool.")


def of_the_cpu():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**45)
    return error.value


@pytest.mark.parametrize(
    "error, start",
    [
        (CUDA, "out of memory on the GPU (2.50 GiB more were asked for); lower data.batch_size"),
        (MPS, "out of memory on the GPU (256 bytes more were asked for); lower data.batch_size"),
        (
            of_the_cpu(),
            "out of memory in main memory (140737488355328 bytes more were asked for); lower data.",
        ),
        (MemoryError(), "out of memory in main memory; lower data.batch_size"),
    ],
    ids=["CUDA", "MPS", "CPU", "Python"],
)
def test_full_memory_is_one_line_that_says_what_to_lower(error, start):
    line = out_of_memory(error)
    assert line.startswith(start) and "\n" not in line
    assert all(name in line for name in ("train.accumulate", "train.precision=bf16", "model.memory_efficient"))


def test_other_errors_are_not_taken_for_full_memory():
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no"), RuntimeError()):
        assert out_of_memory(error) is None


@pytest.mark.parametrize("error", [CUDA, MemoryError()], ids=["CUDA", "Python"])
def test_a_command_that_runs_out_of_memory_ends_with_code_1(app, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch.Tensor, "backward", full)
    tiny = "model.stages=[1,1,1]", "model.growth=[4,4,4]", "train.epochs=1"
    message = app("quickstart", *tiny, f"output={tmp_path}", expect=1)
    assert message.startswith("error: out of memory") and message.count("\n") == 1


def test_an_error_of_the_program_stays_one(monkeypatch):
    def broken(tokens):
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "_run_command", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main()
