"""The networks: sizes, dense twins, and timm's contract as far as a timm user leans on it daily."""

import copy
import re
from functools import partial
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelValidException
from fastai.learner import Learner
from timm.models._efficientnet_builder import round_channels
from timm.optim import param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

from dgc_fastai import AnnealGates, DynamicGroupConv2d, gate_penalty, set_progress
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.layers.group_conv import GroupConv2d, StaticGroupConv2d
from dgc_fastai.models import dgc_mobilenet
from dgc_fastai.ops.selection import use_backend
from helpers.golden import close, equal_states, evaluating, loaders, read_json
from helpers.operators import needs_compiler

NAMES = [
    "dgc_condensenet74",
    "dgc_densenet22",
    "dgc_densenet86",
    "dgc_mobilenetv2_100",
    "dgc_resnet18",
    "dgc_resnet34",
    "dgc_resnet50",
]
TWINS = [name + twin for name in NAMES for twin in ("_dense", "_sgc")]
# Small enough for every test, with each family's every kind of layer.
_DENSENET = dict(stages=(1, 2, 1), growth=(4, 8, 8))
_RESNET = dict(channels=(16, 16, 32, 32), layers=(1, 1, 2, 1))
_MOBILENET = dict(round_chs_fn=partial(round_channels, multiplier=0.25), num_features=64)
FAMILIES = {"densenet": _DENSENET, "condensenet": _DENSENET, "mobilenet": _MOBILENET, "resnet": _RESNET}
# One name for each kind of block, where the others of its family have nothing to add.
KINDS = ["dgc_densenet22", "dgc_mobilenetv2_100", "dgc_resnet18", "dgc_resnet50"]


def small(name, **kwargs):
    sizes = next(sizes for family, sizes in FAMILIES.items() if family in name)
    shallow = [[re.sub(r"_r\d", "_r1", block) for block in stage] for stage in dgc_mobilenet._STAGES]
    with mock.patch.object(dgc_mobilenet, "_STAGES", shallow):  # MobileNetV2's depth is not a keyword
        return timm.create_model(name, **{**sizes, "num_classes": 7, **kwargs})


def test_the_networks_are_in_timm_s_registry():
    assert sorted(timm.list_models("dgc_*")) == sorted(NAMES + TWINS)


@pytest.mark.parametrize("name", NAMES + TWINS)
def test_default_configuration_is_true(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        cfg = model.default_cfg
        features = model.forward_features(torch.empty(1, *cfg["input_size"]))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.get_classifier().out_features == cfg["num_classes"] == model.num_classes


@pytest.mark.parametrize("name", NAMES + TWINS)
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


@pytest.mark.parametrize("name", NAMES)
def test_every_keyword_of_the_method_reaches_every_layer(name):
    model = small(name, heads=2, squeeze_rate=8, gate_factor=0.5, in_chans=1, drop_rate=0.1)
    layers = dgc_layers(model)
    assert {(layer.heads, layer.squeeze_rate, layer.gate_factor) for layer in layers} == {(2, 8, 0.5)}
    assert {layer.preact for layer in layers} == {"mobilenet" not in name}  # its bottlenecks are linear
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_densenet_keywords():
    model = timm.create_model("dgc_densenet86", stages=(1, 3), growth=(8, 16), bottleneck=2, group_3x3=8)
    assert [(layer.in_channels, layer.out_channels) for layer in dgc_layers(model)] == [
        (16, 16), (24, 32), (40, 32), (56, 32),
    ]  # fmt: skip
    assert {m.groups for m in model.modules() if isinstance(m, torch.nn.Conv2d)} == {1, 8}
    features = timm.create_model("dgc_densenet22", stages=(1, 1, 1, 2), growth=(4, 4, 4, 8), features_only=True)
    assert [f.shape[-1] for f in features(torch.randn(2, 3, 32, 32))] == [32, 16, 8, 4]
    with pytest.raises(ValueError, match="differ in length"):
        timm.create_model("dgc_densenet86", stages=(1, 2, 3), growth=(8, 8))
    with pytest.raises(ValueError, match="group_3x3=3"):
        timm.create_model("dgc_densenet86", group_3x3=3)
    for name in ("dgc_densenet22", "dgc_resnet18", "dgc_mobilenetv2_100"):
        with pytest.raises(ValueError, match="connection='sparse' is none of dgc, dense, sgc"):
            timm.create_model(name, connection="sparse")
    for name in ("dgc_resnet18", "dgc_resnet18_sgc", "dgc_densenet86_sgc"):
        with pytest.raises(ValueError, match="heads=3"):
            timm.create_model(name, heads=3)


@pytest.mark.parametrize("name", NAMES)
def test_twins_differ_by_their_convolutions_only(name):
    gated, dense, static = small(name), small(f"{name}_dense", heads=2), small(f"{name}_sgc", heads=2)
    assert dgc_layers(gated) and not dgc_layers(dense) and not dgc_layers(static)

    def filters(model):  # by the place they have in the network, whatever holds them there
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.ndim == 4}
        held = re.compile(r"(\.conv)?(\.0)?\.weight$" if model is static else r"(\.conv)?\.weight$")
        return {held.sub("", name): shape for name, shape in shapes.items()}

    assert filters(gated) == filters(dense)
    replaced = {n for n, module in gated.named_modules() if isinstance(module, DynamicGroupConv2d)}
    grouped = {
        place: (out, channels // 2 if place in replaced else channels, kh, kw)
        for place, (out, channels, kh, kw) in filters(dense).items()
    }
    assert filters(static) == grouped


def test_static_groups_are_interleaved_like_heads():
    # With gates of one, a DGC layer whose heads each ignore the other groups' channels is the group convolution.
    conv = torch.nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False)
    static = StaticGroupConv2d(conv, heads=4)
    layer = DynamicGroupConv2d(8, 12, 3, padding=1, stride=2, heads=4, squeeze_rate=4, preact=False)
    x = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        layer.gates.excite.zero_()
        layer.weight.zero_()
        for out in range(12):
            head, place = out % 4, out // 4
            layer.weight[out, 2 * head : 2 * head + 2] = static[0].weight[3 * head + place]
        close(layer(x), static(x), 1e-5)


def test_the_dense_resnet_is_torchvision_s():
    from torchvision.models import resnet18

    ours, theirs = timm.create_model("dgc_resnet18_dense").eval(), resnet18().eval()
    assert ours.layer1[0].bn2.weight.min() == 1  # residual branches do not start at zero
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(ours(x), theirs(x), 1e-5)


@pytest.mark.parametrize("name", ["dgc_condensenet74", "dgc_densenet86", "dgc_resnet18"])
def test_initialisation_of_a_whole_network_is_the_reference_s(name):
    for module in timm.create_model(name).modules():
        if isinstance(module, (torch.nn.Conv2d, DynamicGroupConv2d)) and module.weight.numel() > 4000:
            kh, kw = module.kernel_size
            out = module.out_channels // getattr(module, "heads", 1)
            assert abs(module.weight.std() / (2 / (kh * kw * out)) ** 0.5 - 1) < 0.1
        elif isinstance(module, torch.nn.Linear) and "densenet" in name:
            assert not module.bias.any()


@pytest.mark.parametrize("name", ["dgc_mobilenetv2_100", "dgc_resnet50"])
def test_twins_of_timm_s_networks_start_as_timm_s(name):
    torch.manual_seed(0)
    dense = timm.create_model(f"{name}_dense")
    theirs = timm.create_model(name.removeprefix("dgc_"), **({} if "mobile" in name else {"zero_init_last": False}))
    assert dense.state_dict().keys() == theirs.state_dict().keys()
    static = timm.create_model(f"{name}_sgc")
    for network in (dense, static):
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
                kh, kw = module.kernel_size  # timm's fan-out: per group in its EfficientNets, whole in its ResNets
                out = module.out_channels // (module.groups if "mobile" in name else 1)
                assert abs(module.weight.std() / (2 / (kh * kw * out)) ** 0.5 - 1) < 0.1


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
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = torch.randn(4, 3, 64, 64)
    for network in (model, twin):
        (network(x).square().sum() + gate_penalty(network)).backward()
    for (parameter_name, parameter), other in zip(model.named_parameters(), twin.parameters()):
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


@pytest.mark.parametrize("name", NAMES + TWINS)
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


def test_published_sizes():
    for key, name, classes in [
        ("dydensenet_cifar10", "dgc_densenet86", 10),
        ("dydensenet_cifar100", "dgc_densenet86", 100),
        ("dydensenet_imagenet", "dgc_condensenet74", 1000),
        ("dyresnet18_imagenet", "dgc_resnet18", 1000),
    ]:
        model = timm.create_model(name, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == read_json("budgets.json")[key]["parameters"]


@pytest.fixture
def group_conv():
    conv = GroupConv2d(16, 8, 3, padding=1, groups=4, bias=False)
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    return conv, x, F.conv2d(x, conv.weight, None, 1, 1, 1, 4)


def by_the_kernel(y):
    return "TrainedGroupConv" in type(y.grad_fn).__name__


@needs_compiler
def test_group_convolutions_are_trained_by_the_kernel(group_conv):
    conv, x, expected = group_conv
    y = conv(x)
    assert by_the_kernel(y) and by_the_kernel(conv(x.detach()))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    leaves = x, conv.weight
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_group_convolutions_are_pytorch_s_where_the_kernel_does_not_do(group_conv):
    conv, x, expected = group_conv
    last = x.detach().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(conv(x), expected)
    assert not by_the_kernel(conv(last))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    biased = GroupConv2d(16, 8, 3, groups=4)
    wide = GroupConv2d(66, 4, 1, groups=2, bias=False)
    assert not by_the_kernel(biased(x)) and not by_the_kernel(wide(torch.randn(1, 66, 3, 3)))
    with use_backend("reference"):  # which has second derivatives
        y = conv(x)
        assert torch.equal(y, expected)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0
    loss = lambda x: torch.func.functional_call(conv, dict(conv.named_parameters()), (x,)).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])
    for form in (torch.jit.script(conv), torch.jit.trace(conv, x), torch.compile(conv, backend="aot_eager")):
        torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-5)
    with FlopCounterMode(display=False) as counter:
        conv(x)
    assert counter.get_total_flops() == 2 * expected.numel() * 4 * 9


def test_twins_are_what_pytorch_makes_of_them():
    for name, ours in (("dgc_densenet22", True), ("dgc_densenet22_dense", False), ("dgc_densenet22_sgc", False)):
        modules = timm.create_model(name).modules()
        assert any(isinstance(module, GroupConv2d) for module in modules) == ours
