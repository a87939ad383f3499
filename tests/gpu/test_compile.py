"""torch.compile and CUDA graphs, of deployed networks and in training."""

import copy

import pytest
import torch

from dgc_fastai import deploy, gate_penalty, set_progress
from helpers.families import small
from helpers.gpu import DEVICE, DRY_RUN, needs_gpu, relative_error
from helpers.networks import images, network

BACKENDS = ["aot_eager"] if DRY_RUN else ["aot_eager", "inductor"]


def compiled(module, backend):
    """The module compiled; the test is skipped if inductor has no compiler here."""
    torch._dynamo.reset()
    return torch.compile(module, backend=backend)


def run_or_skip(call, backend):
    try:
        return call()
    except Exception as error:
        if backend == "inductor" and "compiler" in str(error).lower():
            pytest.skip(f"no compiler here: {' '.join(str(error).split())[:200]}")
        raise


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_deployed_and_compiled(backend, precision):
    # With open gates in bfloat16, where another selection of channels would make a difference of its own.
    model, x = network("dgc_densenet22", progress=float(precision == "float32")), images(size=32)
    with torch.no_grad():
        expected = model(x)
        deployed = deploy(model.to(DEVICE))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16"):
            y = run_or_skip(lambda: compiled(deployed, backend)(x.to(DEVICE)), backend)
    assert relative_error(y.cpu(), expected) < (1e-3 if precision == "float32" else 0.1)


def gradients(model, forward, x):
    model.zero_grad()
    (forward(x).square().mean() + gate_penalty(model)).backward()
    return torch.cat([one.grad.flatten() for one in model.parameters()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_compiled_while_the_gates_close(backend):
    model, x = small("dgc_densenet22").to(DEVICE), torch.randn(2, 3, 32, 32, device=DEVICE)
    other = copy.deepcopy(model)
    forward = compiled(other, backend)
    for progress in (0, 0.4, 0.8):  # without compiling again
        set_progress(model, progress)
        set_progress(other, progress)
        expected = gradients(model, model, x)
        found = run_or_skip(lambda: gradients(other, forward, x), backend)
        assert torch.cosine_similarity(found, expected, dim=0) > 0.999, progress


@needs_gpu
def test_a_deployed_network_in_a_cuda_graph():
    model, x = deploy(network("dgc_resnet18").to(DEVICE)), images(size=64).to(DEVICE)
    with torch.no_grad():
        captured, results = capture(lambda: model(x))
        x.copy_(images(size=64).flip(0))
        captured.replay()
        assert relative_error(results, model(x)) < 1e-4


@needs_gpu
def test_a_training_step_in_a_cuda_graph_follows_the_gates():
    model, x = small("dgc_densenet22").to(DEVICE).train(), torch.randn(2, 3, 32, 32, device=DEVICE)
    for one in model.modules():
        if isinstance(one, torch.nn.BatchNorm2d):
            one.momentum = 0.0

    def step():
        model.zero_grad(set_to_none=False)
        loss = model(x).square().mean() + gate_penalty(model)
        loss.backward()
        return loss

    captured, loss = capture(step)
    for progress in (0, 1):  # the number of inactive channels is read on the device
        set_progress(model, progress)
        captured.replay()
        found = torch.cat([one.grad.flatten().clone() for one in model.parameters()])
        value = loss.clone()
        assert relative_error(value, step()) < 1e-3
        expected = torch.cat([one.grad.flatten() for one in model.parameters()])
        assert torch.cosine_similarity(found, expected, dim=0) > 0.999


def capture(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    return graph, results
