"""What test_simulated_accelerator runs: training on a device must give the CPU's numbers, and wait for nothing."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from dgc_fastai import gate_penalty, set_progress
from dgc_fastai.ops import operator, use_backend
from dgc_fastai.ops.selection import BACKENDS, fastest_backend
from helpers.families import KINDS, small
from helpers.simulated_accelerator import start, values, waits

start()
CASES = [(kind, None, torch.contiguous_format) for kind in KINDS]
CASES += [("dgc_resnet18", None, torch.channels_last)]
CASES += [("dgc_densenet22", backend, torch.contiguous_format) for backend in ("reference", "scaled_weights")]


def train(model, images, classes):
    """A few steps and a validation; the losses."""
    waits.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    losses = []
    for progress in (0, 0.5, 1):
        set_progress(model.train(), progress)
        loss = F.cross_entropy(model(images), classes) + 0.01 * gate_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return [*losses, F.cross_entropy(model.eval()(images), classes)]


@pytest.mark.parametrize("name, backend, format", CASES)
def test_training_gives_the_numbers_of_the_cpu(name, backend, format):
    theirs = small(name).to(memory_format=format)
    ours = copy.deepcopy(theirs).to("sim")
    images, classes = torch.randn(4, 3, 32, 32).contiguous(memory_format=format), torch.arange(4)
    with use_backend(backend):
        found = train(ours, images.to("sim"), classes.to("sim"))
        assert waits == []
        select = lambda desc, *_: BACKENDS[backend or fastest_backend(desc, None, "sim")]  # noqa: E731
        with mock.patch.object(operator, "select_backend", select):
            expected = train(theirs, images, classes)
    # Where no channel is dropped, gates have other strides on a CPU, and sums another order.
    both = [[*model.state_dict().values(), *(one.grad for one in model.parameters())] for model in (ours, theirs)]
    for one, other in zip(found + both[0], expected + both[1]):
        assert other.isfinite().all()
        torch.testing.assert_close(values(one), other, rtol=0, atol=1e-4 * float(other.abs().max()))


MIXED = {
    "addition": lambda x: x + torch.ones(2),
    "number in place": lambda x: torch.zeros(()).add_(x.sum()),
    "index": lambda x: x[torch.tensor([0, 1])],
    "not elementwise": lambda x: torch.stack([x.sum(), torch.zeros(())]),
}
WAITS = {
    "item": lambda x: x.sum().item(),
    "to the CPU": lambda x: x.cpu(),
    "copy to the CPU": lambda x: torch.zeros(3, 2).copy_(x),
    "from the CPU": lambda x: torch.ones(2).to(x.device),
    "made on the CPU": lambda x: torch.tensor(1.0, device=x.device),
    "mask": lambda x: x[x > 0],
}
FINE = {
    "number of the CPU": lambda x: x + torch.tensor(1.0),
    "made on the device": lambda x: x + torch.ones(2, device=x.device),
    "view in place": lambda x: x.t()[:, 1:].mul_(2)[:, :1],
}


@pytest.mark.parametrize("name", [*MIXED, *WAITS, *FINE])
def test_device(name):
    x = torch.ones(3, 2).to("sim")
    waits.clear()
    if name in MIXED:
        with pytest.raises(RuntimeError, match="is on cpu, other tensors are on sim:0"):
            MIXED[name](x)
    elif name in WAITS:
        WAITS[name](x)
        assert len(waits) == 1
    else:
        assert (values(FINE[name](x)) == 2).all() and waits == []
