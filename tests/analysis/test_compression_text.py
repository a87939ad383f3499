"""What a compression is said to be worth."""

from pathlib import Path

import pytest

from dgc_fastai.analysis import compression_text as text
from dgc_fastai.analysis.report.build import _compression
from dgc_fastai.analysis.report.collect import StoredRun


def row(network, runtime, median, precision="float32", batch=1):
    return {
        "network": network, "runtime": runtime, "precision": precision, "batch": batch,
        "median": median, "min": 0.99 * median, "max": 1.01 * median,
    }  # fmt: skip


def compression(*rows, top_1=(0.989, 0.987), gated_share=0.9, teacher=None, before=0):
    cost = {"macs": 2e9, "parameters": 1e7, "bytes": 4e7}
    return {
        "before": {"arch": "resnet18", "weights": "w.pth", "epochs": before, "top_1": top_1[0], **cost},
        "after": {"epochs": 5, "top_1": top_1[1], **cost, "macs": 1e9, "gated_share": gated_share},
        "input": [3, 64, 64],
        "teacher": teacher,
        "speed": {"rows": list(rows), "machine": {"processor": "P", "threads": 2, "torch": "2", "device": "cpu"}},
    }


FASTER = row("before", "PyTorch", 9.0), row("before", "OpenVINO", 5.1), row("after", "deployed", 2.3)


def test_the_answer_is_for_the_fastest_dense_form():
    found = compression(*FASTER)
    assert text.answer(found) == "resnet18, 98.90 % at 5.1 ms, became a network of 98.70 % at 2.30 ms."
    assert text.verdict(found) == "It is 2.22 x as fast as dense in OpenVINO, the fastest dense form in float32."
    assert text.advice(found) == []


def test_what_is_not_faster_is_said_to_be_so_with_what_to_try():
    found = compression(*FASTER[:2], row("after", "deployed", 5.0), gated_share=0.4)
    assert text.verdict(found).startswith("It is not faster: 1.02 x the speed of dense in OpenVINO")
    advice = "\n".join(text.advice(found))
    assert "Only 40 % of its MACs" in advice and "depthwise" in advice
    for key in ("data.size=128", "model.convert.target=0.35", "model.convert.skip", "in OpenVINO and float32"):
        assert key in advice
    assert "depthwise" not in "\n".join(text.advice(compression(*FASTER[:2], row("after", "deployed", 5.0))))


def test_a_dense_network_that_is_faster_in_bf16_is_named():
    found = compression(*FASTER, row("before", "OpenVINO", 1.2, "bf16"), row("after", "deployed", 2.5, "bf16"))
    assert "In bf16 the dense network takes 1.20 ms in OpenVINO, which is faster still." in text.verdict(found)
    assert any("the dense network, in OpenVINO and bf16" in line for line in text.advice(found))
    assert text.speedup(found, 1, "bf16") == pytest.approx(1.2 / 2.5)
    assert text.speedup(found, 1) == pytest.approx(1.2 / 2.3)


@pytest.mark.parametrize("teacher, count", [(None, 2), ("before", 1)])
def test_lost_accuracy_has_its_advice(teacher, count):
    advice = text.advice(compression(*FASTER, top_1=(0.95, 0.93), teacher=teacher))
    assert len(advice) == count and all(line.startswith("For accuracy") for line in advice)
    assert any("train.teacher=before" in line for line in advice) == (teacher is None)


def test_tables_have_a_cell_for_each_batch():
    found = compression(*FASTER, row("before", "PyTorch", 90, batch=32), row("after", "deployed", 30, batch=32))
    assert list(text.speed_rows(found, "float32")) == [
        ("before, PyTorch", "9.0", "90"),
        ("before, OpenVINO", "5.1", ""),
        ("after, deployed", "2.30", "30.0"),
        ("speedup", "2.22 x", "3.00 x"),
    ]
    assert [cells[3] for cells in text.cost_rows(found)] == ["-0.20 points", "0.50 x", "1.00 x", "1.00 x"]


@pytest.mark.parametrize(
    "epochs, begin", [(0, "The dense network was given"), (1, "The dense network was trained for")]
)
def test_training_time_of_both_is_told(epochs, begin):
    assert text.how_trained(compression(*FASTER, before=epochs)).startswith(begin)


def test_the_page_has_sentences_and_cells_and_says_what_it_cannot_read():
    found = compression(*FASTER)
    found["speed"]["left_out"] = ["OpenVINO is not installed."]
    run = StoredRun(Path("run"), summary={"compression": found})
    page = _compression(run)
    assert page["answer"] == text.answer(found) and "OpenVINO is not installed." in page["lines"]
    assert page["batches"] == ["one image"] and page["speed"][0] == ["float32", "before, PyTorch", "9.0"]
    assert not run.missing and _compression(StoredRun(Path("run"))) is None
    damaged = StoredRun(Path("run"), summary={"compression": {"before": 1}})
    assert _compression(damaged) is None and "cannot read" in damaged.missing[0]
