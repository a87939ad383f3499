"""Where a network is computed, and in which memory format."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dgc_fastai import deploy
from dgc_fastai.models.factory import place
from helpers.networks import agree, images, network

CPU = torch.device("cpu")


def formats(model, batch):
    """In which formats the first convolution meets images, and whether its weights are channels-last."""
    seen, conv = [], next(one for one in model.modules() if isinstance(one, nn.Conv2d))
    handle = conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(batch)
    handle.remove()
    (x,) = seen
    assert torch.equal(x, batch)
    return tuple(one.is_contiguous(memory_format=torch.channels_last) for one in (x, conv.weight))


@pytest.mark.parametrize("wanted", [True, False, None])
def test_images_are_computed_in_the_format_of_the_network(wanted):
    model, batch = place(network(), CPU, wanted), images()
    assert formats(model, batch) == (bool(wanted), bool(wanted))
    if wanted:  # also in averaged weights, and in a learner that was exported
        assert formats(copy.deepcopy(model), batch) == formats(pickle.loads(pickle.dumps(model)), batch) == (True, True)
        agree(deploy(model)(batch), model(batch))
