"""The same numbers from copies and from scripted, traced and exported networks, in any memory format."""

import copy

import pytest
import torch

from dgc_fastai import set_progress
from helpers.families import KINDS, small
from helpers.golden import close, evaluating


@pytest.mark.parametrize("name", KINDS + ["dgc_densenet22_sgc", "dgc_resnet18_sgc"])
def test_copies_memory_formats_and_types(name):
    x = torch.randn(2, 3, 64, 64)
    model = small(name).eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        other = small(name).eval()
        assert not torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        close(last(x.contiguous(memory_format=torch.channels_last)), expected, 1e-4)
        for dtype in (torch.bfloat16, torch.half):
            y = copy.deepcopy(model).to(dtype)(x.to(dtype))
            assert y.dtype == dtype
            close(y.float(), expected, 0.1)


@pytest.mark.parametrize("name", KINDS + ["dgc_condensenet74_sgc", "dgc_mobilenetv2_100_sgc", "dgc_resnet50_sgc"])
def test_scripted_traced_and_exported_models_agree(name):
    from timm.models._features_fx import create_feature_extractor

    x = torch.randn(2, 3, 64, 64)
    model = evaluating(small(name), x)
    set_progress(model, 1)
    with torch.no_grad():
        expected = model(x)
        close(torch.jit.script(model)(x), expected, 1e-5)
        graph = create_feature_extractor(model, [name_of_last_module(model)])
        close(next(iter(graph(x).values())), expected, 1e-5)
        close(torch.export.export(model, (x,)).module()(x), expected, 1e-5)


def name_of_last_module(model):
    return model.default_cfg["classifier"]
