"""Networks in training: statistics, gradients, memory, and a whole annealed run as one graph."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelValidException
from fastai.learner import Learner

from dgc_fastai import AnnealGates, gate_penalty, set_progress
from dgc_fastai.layers.gate_schedule import dgc_layers
from helpers.families import KINDS, NAMES, small
from helpers.golden import close, equal_states, loaders


@pytest.mark.parametrize("name", NAMES)
def test_a_new_network_can_be_evaluated(name):
    # Gates multiply features by features: with the usual statistics of a new batch norm this overflows to NaN.
    model = timm.create_model(name, num_classes=7)
    assert all(module.training for module in model.modules())
    size = model.default_cfg["input_size"]
    with torch.no_grad():
        for scale in (0, 0.1, 1, 2):
            assert model.eval()(scale * torch.randn(2, *size)).isfinite().all()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 0 and norm.momentum is not None for norm in norms)
    before = torch.get_rng_state()
    model.init_norm_stats()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("progress", [0, 0.5, 1])
def test_every_parameter_learns_with_and_without_checkpointing(name, progress):
    model = small(name)
    set_progress(model, progress)
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    x = torch.randn(4, 3, 64, 64)
    for network in (model, checkpointed):
        (network(x).square().sum() + gate_penalty(network)).backward()
    for (parameter_name, parameter), other in zip(model.named_parameters(), checkpointed.parameters()):
        assert parameter.grad is not None, parameter_name
        close(other.grad, parameter.grad, 1e-4)


@pytest.mark.parametrize("connection", ["dgc", "dense"])
def test_memory_efficient_is_the_same_training_from_less(connection):
    def activations(tensor):
        if tensor.numel() >= 4 * 16 * 16:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, sizes, results = torch.randn(4, 3, 16, 16), [], []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(
            "dgc_densenet22", stages=(6, 6), growth=(8, 16), connection=connection, memory_efficient=memory_efficient
        )
        set_progress(model.train(), 0.5)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(activations, lambda tensor: tensor):
            loss = model(x).square().sum() + gate_penalty(model)
        sizes.append(sum(kept.values()))
        loss.backward()
        results.append((loss, model.state_dict(), [parameter.grad for parameter in model.parameters()]))
    (loss, state, gradients), (other, other_state, other_gradients) = results
    close(other, loss, 1e-6)
    assert equal_states(state, other_state)  # norms' statistics count each batch once
    for ours, theirs in zip(other_gradients, gradients):
        close(ours, theirs, 1e-4)
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("name", KINDS)
def test_compiled_whole_once_for_all_progress(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = small(name)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    for progress in (0, 0.2, 0.9):
        set_progress(model, progress)
        compiled(x)
        assert gate_penalty(model) > 0
    assert counter.frame_count == 1


class NoValidation(Callback):
    def before_validate(self):
        raise CancelValidException


def test_a_whole_annealed_run_is_one_graph():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = timm.create_model("dgc_densenet22")
    images, labels = torch.randn(36, 3, 16, 16), torch.randint(10, (36,))
    learn = Learner(loaders(images, labels, 6), torch.compile(model, backend="eager", fullgraph=True), F.cross_entropy)
    seen = set()
    counting = Callback(after_step=lambda self: seen.add(int(dgc_layers(model)[-1].inactive_channels)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        learn.fit(4, 1e-3, cbs=[AnnealGates(), NoValidation(), counting])
    assert len(seen) > 10 and max(seen) == round(0.75 * dgc_layers(model)[-1].in_channels)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
