"""What a benchmark measures: which networks, in which states, compared with what."""

import torch

from dgc_fastai.analysis import benchmark_plan
from dgc_fastai.analysis.benchmark_plan import gated_name, plan_benchmark
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.ops import reference as definition
from dgc_fastai.ops import selection
from dgc_fastai.recipe.schema import ARCHITECTURES
from helpers.benchmarks import DEPLOYED, tiny
from helpers.golden import equal_states


def networks(monkeypatch):
    """The networks that a plan is going to build, by name."""
    built, build = {}, benchmark_plan.build_model

    def spy(model, *size):
        built[model.arch] = build(model, *size)
        return built[model.arch]

    monkeypatch.setattr(benchmark_plan, "build_model", spy)
    return built


def test_a_baseline_s_recipe_is_benchmarked_as_its_gated_network(monkeypatch):
    assert all(
        gated_name(name) in ARCHITECTURES and "_" not in gated_name(name)[4:].replace("_100", "")
        for name in ARCHITECTURES
    )
    for arch in ("dgc_densenet22", "dgc_densenet22_dense", "dgc_densenet22_sgc"):
        built = networks(monkeypatch)
        plan_benchmark(tiny(f"model.arch={arch}"))
        assert set(built) == {"dgc_densenet22", "dgc_densenet22_dense", "dgc_densenet22_sgc"}
        assert dgc_layers(built["dgc_densenet22"]) and not dgc_layers(built["dgc_densenet22_dense"])


def test_each_variant_is_in_its_own_state(monkeypatch):
    built = networks(monkeypatch)
    plan = plan_benchmark(tiny(), compiled=False)
    gated = built["dgc_densenet86"]
    ran = []
    for model in built.values():
        model.register_forward_pre_hook(lambda model, images: ran.append((model, model.training, len(images[0]))))
    formula, reference = [], definition.gated_conv2d
    monkeypatch.setattr(definition, "gated_conv2d", lambda *args: formula.append(1) or reference(*args))
    layer = dgc_layers(gated)[0]
    closed = {"0": 0, "0.5": round(layer.in_channels * 0.75 * 3 / 2 * (0.5 - 1 / 12)), "1": layer.in_channels * 3 // 4}
    for what, batch, variants, _ in plan:
        for variant in variants:
            del ran[:], formula[:]
            with variant.setting():
                variant.call()
                name, _, progress = variant.name.partition(" at ")
                if name in DEPLOYED:
                    assert not ran  # a copy
                    continue
                expected = {"reference": "", "ours": "", "sgc": "_sgc"}.get(name, "_dense")
                assert ran == [(built[f"dgc_densenet86{expected}"], what == "training step", batch)]
                if progress:
                    assert layer.inactive_channels == closed[progress]
            assert len(formula) == (len(dgc_layers(gated)) if name == "reference" else 0), variant.name
            assert all(layer.penalty is None for layer in dgc_layers(gated))  # it holds memory
    assert selection._forced is None


def test_deployed_forms_compute_what_the_networks_compute(monkeypatch):
    built = networks(monkeypatch)
    outputs = []
    monkeypatch.setattr(benchmark_plan, "_infer", lambda recipe, network, images: outputs.append(network(images)))
    (_, one, many) = plan_benchmark(tiny(), compiled=False)
    for variants in (one.variants, many.variants):
        found = {}
        for variant in variants:
            with variant.setting(), torch.no_grad():
                variant.call()
                found[variant.name] = outputs.pop()
        for name, other in (
            ("deployed", "ours at 1"),
            ("dense channels-last", "dense"),
            ("ours at 1", "reference at 1"),
        ):
            torch.testing.assert_close(found[name], found[other], rtol=1e-4, atol=1e-4)
    assert built


def test_a_step_trains_and_leaves_the_weights(monkeypatch):
    built = networks(monkeypatch)
    updated, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: updated.append(1) or step(*args))
    gradients = []
    for lasso in (0.0, 1.0):
        (plan, *_) = plan_benchmark(tiny(f"train.lasso_weight={lasso}", "train.optimizer=adamw"))
        network, ours = built["dgc_densenet86"], plan.variants[-2]
        weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        gradients.append({})
        for name, parameter in network.named_parameters():
            parameter.register_hook(lambda gradient, name=name, found=gradients[-1]: found.update({name: gradient}))
        with ours.setting():
            ours.call()
        assert equal_states(weights, dict(network.named_parameters()))
        assert all(parameter.grad is None for parameter in network.parameters())
    assert len(updated) == 2 and gradients[0].keys() == gradients[1].keys() == weights.keys()
    # The seed is the same, so that the penalty makes the difference: a head's mean gate grows with its biases.
    for layer in dgc_layers(network):
        (name,) = (name for name, parameter in network.named_parameters() if parameter is layer.gates.bias)
        difference = gradients[1][name] - gradients[0][name]
        assert 0.5 * layer.heads < difference.sum() < 1.001 * layer.heads


def test_the_data_need_not_be_there(monkeypatch, tmp_path):
    classes = {}
    build = benchmark_plan.build_model

    def spy(model, count, size):
        classes[name] = count
        return build(model, count, size)

    monkeypatch.setattr(benchmark_plan, "build_model", spy)
    for name in ("digits", "cifar10", "cifar100", "folder"):
        path = () if name == "digits" else (f"data.path={tmp_path}/nowhere",)
        plan = plan_benchmark(tiny(f"data.name={name}", "data.size=16", "data.batch_size=1", *path))
        assert [(one.what, one.batch) for one in plan] == [("training step", 1), ("inference", 1)]
    assert classes == {"digits": 10, "cifar10": 10, "cifar100": 100, "folder": 1000}
