"""Measuring a network before and after: every form computes the same network, whatever it runs in."""

import importlib.util

import pytest
import timm
import torch

from dgc_fastai import convert, set_progress
from dgc_fastai.analysis import compression, runtimes
from dgc_fastai.utils import timing
from helpers.runs import silent

SIZE = (1, 16, 16)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(compression, "ROUNDS", 1)
    monkeypatch.setattr(timing, "MIN_SECONDS", 1e-6)


def networks():
    before = timm.create_model("resnet10t", in_chans=1, num_classes=10).eval()
    after = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    after = convert(after, 4, 0.5, skip="layer4*", input_size=SIZE).eval()
    set_progress(after, 1.0)
    return before, after


def test_cost_is_that_of_the_channels_kept_now():
    before, after = networks()
    dense, cut = (compression.measure_cost(network, SIZE) for network in (before, after))
    assert dense["gated_share"] == 0 and 0.3 < cut["gated_share"] < 0.8
    assert cut["macs"] < 0.8 * dense["macs"] and cut["parameters"] > dense["parameters"]
    assert cut["bytes"] > dense["bytes"] > 4 * dense["parameters"]


@pytest.mark.parametrize("has_bf16", [True, False])
def test_each_network_is_timed_in_each_precision_and_batch(quick, monkeypatch, has_bf16):
    monkeypatch.setattr(compression, "_multiplies_bf16", lambda device: has_bf16)
    monkeypatch.setattr(compression, "runtime_calls", lambda *arguments: ([], ["None is installed."]))
    found = compression.measure_speed(*networks(), SIZE, 4, torch.device("cpu"), silent())
    forms = [(row["network"], row["runtime"], row["precision"], row["batch"]) for row in found["rows"]]
    assert forms == [
        (network, runtime, precision, batch)
        for batch in (1, 4)
        for network, runtime in (("before", "PyTorch"), ("before", "deployed"), ("after", "deployed"))
        for precision in (["float32", "bf16"] if has_bf16 else ["float32"])
    ]
    assert all(0 < row["min"] <= row["median"] <= row["max"] for row in found["rows"])
    assert found["left_out"] == ["None is installed."] and found["machine"]["torch"]


def test_one_image_is_not_timed_twice(quick, monkeypatch):
    monkeypatch.setattr(compression, "runtime_calls", lambda *arguments: ([], []))
    found = compression.measure_speed(*networks(), SIZE, 1, torch.device("cpu"), silent())
    assert {row["batch"] for row in found["rows"]} == {1}


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


@pytest.mark.skipif(not installed("onnx", "onnxscript", "onnxruntime"), reason="needs ONNX Runtime")
def test_runtimes_that_are_installed_compute_the_network(monkeypatch):
    before, _ = networks()
    batches = [torch.randn(count, 1, 32, 32) for count in (1, 3)]  # OpenVINO cannot read a pooling of one pixel
    calls, left_out = runtimes.runtime_calls(before, batches, ["float32"])
    names = [name for name, runtime in runtimes.RUNTIMES.items() if installed(runtime.package)]
    assert [(one.runtime, one.batch) for one in calls] == [(name, batch) for name in names for batch in (1, 3)]
    assert left_out == ([] if "OpenVINO" in names else ["OpenVINO is not installed."])
    for one in calls:
        with torch.no_grad():
            expected = before(batches[one.batch != 1])
        torch.testing.assert_close(torch.as_tensor(one.call()), expected, rtol=1e-3, atol=1e-3)


def fails(graph, images, precision):
    raise RuntimeError("no such\noperator")


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda graph, images, precision: lambda: torch.zeros(len(images), 10).numpy(), "its outputs differ by 1e+00"),
        (lambda graph, images, precision: lambda: torch.full((len(images), 10), torch.nan).numpy(), "differ by nan"),
        (fails, "Odd cannot compute the network in float32: no such operator."),
    ],
)
def test_a_runtime_with_other_outputs_is_left_out(monkeypatch, make, reason):
    monkeypatch.setattr(runtimes, "onnx_graph", lambda *arguments: torch)
    monkeypatch.setattr(torch, "SerializeToString", lambda: b"", raising=False)
    monkeypatch.setattr(runtimes, "RUNTIMES", {"Odd": runtimes._Runtime("torch", ("float32",), make)})
    monkeypatch.setattr(runtimes, "_has", lambda package: True)
    calls, (line,) = runtimes.runtime_calls(networks()[0], [torch.randn(2, *SIZE)], ["float32", "bf16"])
    assert not calls and reason in line


@pytest.mark.parametrize(
    "packages, line",
    [
        ([], "ONNX Runtime and OpenVINO are not installed."),
        (["openvino"], "OpenVINO would need the packages onnx and onnxscript."),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, packages, line):
    monkeypatch.setattr(runtimes, "_has", lambda package: package in packages)
    assert runtimes.runtime_calls(networks()[0], [torch.randn(1, *SIZE)], ["float32"]) == ([], [line])
