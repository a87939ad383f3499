"""The networks as a timm user meets them: registry, configuration, features, classifier, parameter groups."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay

from dgc_fastai.layers.gate_schedule import dgc_layers
from helpers.families import BASELINES, KINDS, NAMES, small
from helpers.golden import evaluating


def test_the_networks_are_in_timm_s_registry():
    assert sorted(timm.list_models("dgc_*")) == sorted(NAMES + BASELINES)


@pytest.mark.parametrize("name", NAMES + BASELINES)
def test_default_configuration_is_true(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        cfg = model.default_cfg
        features = model.forward_features(torch.empty(1, *cfg["input_size"]))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.get_classifier().out_features == cfg["num_classes"] == model.num_classes


@pytest.mark.parametrize("name", NAMES + BASELINES)
def test_timm_s_surface(name):
    x = torch.randn(2, 3, 64, 64)
    model = evaluating(small(name), x)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.isfinite().all()
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(final, features)
        assert [i.shape[1] for i in intermediates] == [f["num_chs"] for f in model.feature_info]
        assert [64 // i.shape[-1] for i in intermediates] == [f["reduction"] for f in model.feature_info]
        chosen = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True, stop_early=True)
        assert [i.shape[1] for i in chosen] == [model.feature_info[i]["num_chs"] for i in (0, 2)]
        extractor = small(name, features_only=True, out_indices=(0, 2)).eval()
        assert extractor.feature_info.channels() == [i.shape[1] for i in chosen]
        assert [f.shape[1] for f in extractor(x)] == [model.feature_info[i]["num_chs"] for i in (0, 2)]
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)


@pytest.mark.parametrize("name", NAMES + BASELINES)
def test_parameter_groups_cover_every_parameter(name):
    from timm.models import group_parameters

    model = small(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
        assert len(groups) > 3


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_the_gates_biases(name):
    model = small(name)
    undecayed, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    biases = [layer.gates.bias for layer in dgc_layers(model)]
    assert len(model.no_weight_decay()) == len(biases) > 0
    names = dict(model.named_parameters())
    assert {id(names[n]) for n in model.no_weight_decay()} == {id(bias) for bias in biases}
    assert {id(bias) for bias in biases} <= {id(p) for p in undecayed["params"]}
    assert {id(layer.weight) for layer in dgc_layers(model)} <= {id(p) for p in decayed["params"]}


@pytest.mark.parametrize("name", KINDS)
def test_dropout_before_the_classifier(name):
    x = torch.randn(2, 3, 64, 64)
    model = evaluating(small(name, drop_rate=0.9), x)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    pooled = model.train().forward_head(features, pre_logits=True)
    assert (pooled == 0).float().mean() > 0.7
