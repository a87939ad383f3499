"""A network in other runtimes for CPUs, those that are installed: what a dense network would be deployed in."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..inference.export import onnx_graph
from ..utils.errors import UserError
from ..utils.text import one_line

__all__ = ["RuntimeCall", "runtime_calls"]

TOLERANCE = {"float32": 1e-3, "bf16": 0.1}  # of outputs, relative to the largest

Call = Callable[[], Any]


class RuntimeCall(NamedTuple):
    """A function that computes one batch in a runtime."""

    runtime: str
    precision: str
    batch: int
    call: Call


def runtime_calls(
    network: nn.Module, batches: Sequence[Tensor], precisions: Sequence[str]
) -> tuple[list[RuntimeCall], list[str]]:
    """Functions that compute batches in the other runtimes, and a sentence about each that cannot.

    A runtime has as many threads as PyTorch. Its outputs are compared with the network's.

    Args:
        network: on the CPU, in evaluation mode.
        batches: [B, C, H, W] each, float32, on the CPU.
        precisions: float32 and bf16; ONNX Runtime computes in float32 only.
    """
    calls: list[RuntimeCall] = []
    found = {name: runtime for name, runtime in RUNTIMES.items() if _has(runtime.package)}
    missing = [name for name in RUNTIMES if name not in found]
    left_out = [f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed."] if missing else []
    if not found:
        return calls, left_out
    if not (_has("onnx") and _has("onnxscript")):
        return calls, [f"{' and '.join(found)} would need the packages onnx and onnxscript."]
    try:
        graph = onnx_graph(network, torch.cat([batches[0], batches[0]])).SerializeToString()
    except UserError as error:
        return calls, [f"The network {error}."]
    for name, runtime in found.items():
        for precision in (one for one in precisions if one in runtime.precisions):
            try:
                own = [RuntimeCall(name, precision, len(one), runtime.make(graph, one, precision)) for one in batches]
                difference = max(_difference(one.call, network, images) for one, images in zip(own, batches))
            except Exception as error:  # each runtime raises its own
                left_out.append(f"{name} cannot compute the network in {precision}: {one_line(error)[:200]}.")
                continue
            if difference <= TOLERANCE[precision]:
                calls += own
            else:
                left_out.append(f"{name} in {precision} is left out: its outputs differ by {difference:.0e}.")
    return calls, left_out


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _onnx_runtime(graph: bytes, images: Tensor, precision: str) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)[0]


def _openvino(graph: bytes, images: Tensor, precision: str) -> Call:
    import openvino

    model = openvino.Core().read_model(graph)
    model.reshape(list(images.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    batch = images.numpy()
    return lambda: request.infer([batch], share_inputs=True, share_outputs=True)[0]


@torch.inference_mode()
def _difference(call: Call, network: nn.Module, images: Tensor) -> float:
    """The largest difference of the outputs from the network's, relative to the largest output."""
    expected = network(images)
    return float((torch.from_numpy(np.array(call(), np.float32)) - expected).abs().max() / expected.abs().max())


class _Runtime(NamedTuple):
    package: str
    precisions: tuple[str, ...]
    make: Callable[[bytes, Tensor, str], Call]


RUNTIMES: Mapping[str, _Runtime] = {
    "ONNX Runtime": _Runtime("onnxruntime", ("float32",), _onnx_runtime),
    "OpenVINO": _Runtime("openvino", ("float32", "bf16"), _openvino),
}
