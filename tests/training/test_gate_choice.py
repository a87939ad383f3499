"""Gate factors chosen for a target: once, before training, and kept wherever the network goes."""

import csv
import json
from dataclasses import replace

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file

from dgc_fastai import build_learner, load_recipe, save_checkpoint
from dgc_fastai.analysis.compare import _value, show_comparison
from dgc_fastai.cli.tables import show_choice
from dgc_fastai.inference.predict import Predictor
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.models.cost import budget
from dgc_fastai.training import gate_choice, run
from dgc_fastai.training.gate_choice import GateChoice, choose_gate_factors
from dgc_fastai.training.layer_times import TimedNetwork
from dgc_fastai.training.run import TrainingRun
from dgc_fastai.training.run_folder import as_begun, interrupted_run
from dgc_fastai.utils.errors import CheckpointError, Interrupted, RecipeError
from helpers.golden import equal_states
from helpers.runs import StopAt, same_run, silent

CPU = torch.device("cpu")
TEXT = """
name: r
model: {arch: resnet10t, weights: WEIGHTS, convert: {heads: 4, target: 0.7, skip: ["layer4*"]}}
data: {name: digits, size: 16, batch_size: 400, augment: [crop_flip]}
train: {epochs: 1, lr: 0.01}
log: {report: false}
"""


@pytest.fixture(scope="module", autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_choice, "MIN_IMAGES", 16)
        patch.setattr(gate_choice, "MAX_IMAGES", 16)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen")
    torch.manual_seed(3)
    network = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    torch.nn.init.normal_(network.fc.weight)  # outputs that differ
    save_checkpoint(network, folder / "w.safetensors")
    (folder / "r.yaml").write_text(TEXT.replace("WEIGHTS", f"{folder}/w.safetensors"))
    return folder


@pytest.fixture
def recipe(folder):
    return lambda *overrides: load_recipe(folder / "r.yaml", [f"output={folder}/runs", *overrides])


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing has disturbed, and its folder."""
    one = TrainingRun(load_recipe(folder / "r.yaml", [f"output={folder}/whole"]))
    return one, one.fit(silent())


@pytest.fixture
def no_scan(monkeypatch):
    def refuse(*_):
        raise AssertionError("chosen again")

    monkeypatch.setattr(run, "choose_gate_factors", refuse)


def test_the_run_keeps_what_was_chosen(whole, folder):
    one, place = whole
    kept = load_recipe(place / "recipe.yaml")
    factors = kept.model.convert.gate_factor
    assert kept == one.recipe == one.learner.recipe and kept.model.convert.target == 0.7
    assert factors == one.choice.gate_factor and len(factors) == 7 and len({*factors.values()}) >= 3
    layers = {
        name: layer for name, layer in one.learner.model.named_modules() if layer in dgc_layers(one.learner.model)
    }
    assert {name: layer.gate_factor for name, layer in layers.items()} == {
        name: factor for name, factor in factors.items() if factor < 1
    }
    for layer in layers.values():
        assert int(layer.inactive_channels) == round(layer.in_channels * (1 - layer.gate_factor))
    summary = json.loads((place / "summary.json").read_text())
    assert summary["macs"] == one.cost.macs == budget(one.learner.model, (1, 16, 16)).macs
    assert summary["macs"] / summary["macs_dense"] == pytest.approx(0.7, abs=2e-3)
    rows = list(csv.DictReader(open(place / "allocation.csv")))
    assert [(row["layer"], float(row["gate_factor"])) for row in rows] == list(factors.items())
    rest = one.cost.macs_dense - sum(int(row["macs_dense"]) for row in rows)
    assert rest + sum(int(row["macs"]) for row in rows) == one.cost.macs


def test_weights_rebuild_their_network_without_a_choice(whole, folder, app, no_scan, recipe):
    one, place = whole
    network = Predictor.from_weights(place).model
    assert equal_states(network.state_dict(), load_file(place / "best.safetensors"))
    assert [layer.gate_factor for layer in dgc_layers(network)] == [
        layer.gate_factor for layer in dgc_layers(one.learner.model)
    ]
    top_1 = json.loads((place / "summary.json").read_text())["best"]["top_1"]
    for text in (place / "recipe.yaml", folder / "r.yaml"):  # and with the recipe before the choice
        fresh = TrainingRun(load_recipe(text))
        fresh.load(place / "best.safetensors")
        assert fresh.evaluate(silent())["top_1"] == pytest.approx(top_1)
    again = TrainingRun(recipe(f"model.weights={place}")).learner  # to train further
    assert equal_states(again.model.state_dict(), load_file(place / "best.safetensors"))


def test_a_run_resumes_to_the_same_bits_without_a_choice(whole, recipe, monkeypatch):
    plan = recipe("output=" + str(whole[1].parent.parent / "parts"))
    first = TrainingRun(plan)
    first.learner.add_cb(StopAt(0, 1))
    with pytest.raises(Interrupted):
        first.fit(silent())
    monkeypatch.setattr(run, "choose_gate_factors", None)
    place, found = interrupted_run(plan)
    assert found == f"Going on with {place}."
    second = TrainingRun(as_begun(plan, place), gets_weights=True)
    assert same_run(whole[1], second.fit(silent(), place))


def test_the_choice_draws_no_random_number(whole, recipe, no_scan):
    """The recipe with the chosen gate factors written out trains to the same bits."""
    one, place = whole
    written = recipe(f"model.convert.gate_factor={json.dumps(one.choice.gate_factor)}", "model.convert.target=null")
    other = TrainingRun(written).fit(silent())
    for name in ("last.safetensors", "best.safetensors"):
        assert equal_states(load_file(place / name), load_file(other / name)), name


def test_other_processes_take_the_choice_of_the_main_one(whole, recipe, monkeypatch):
    choice = whole[0].choice
    monkeypatch.setattr("dgc_fastai.utils.launch.is_main_process", lambda: False)
    monkeypatch.setattr(gate_choice, "broadcast_bytes", lambda _: json.dumps(vars(choice)).encode())
    assert choose_gate_factors(None, recipe(), [], CPU) == choice
    monkeypatch.setattr(gate_choice, "broadcast_bytes", lambda _: json.dumps({"error": "no image"}).encode())
    with pytest.raises(RecipeError, match="^no image$"):
        choose_gate_factors(None, recipe(), [], CPU)


def test_without_weights_one_gate_factor_meets_the_target(recipe, no_scan):
    one = TrainingRun(recipe("model.weights=null"))
    factors = {layer.gate_factor for layer in dgc_layers(one.learner.model)}
    assert len(factors) == 1 and one.choice is None
    assert one.cost.macs / one.cost.macs_dense == pytest.approx(0.7, abs=0.01)
    with pytest.raises(RecipeError, match="target_ms: it is for trained networks; set model.weights, or target$"):
        TrainingRun(recipe("model.weights=null", "model.convert={target_ms: 1}")).learner  # noqa: B018


def test_a_network_of_one_s_own(recipe):
    own = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    learn = build_learner(recipe("model.convert.target=0.8"), own)
    assert learn.model is own and not learn.recipe.model.convert.has_to_choose
    cost = budget(own, (1, 16, 16))
    assert cost.macs / cost.macs_dense == pytest.approx(0.8, abs=2e-3)


def test_weights_that_tell_nothing_are_refused_in_a_line(folder, recipe, whole):
    place = whole[1]
    plan = recipe(f"model.weights={place}", "model.convert.target=0.8")
    with pytest.raises(CheckpointError) as error:
        TrainingRun(plan).learner  # noqa: B018
    assert str(error.value).startswith(f"{place}/best.safetensors: ") and "\n" not in str(error.value)
    broken = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    broken.fc.weight.data.fill_(float("nan"))
    save_checkpoint(broken, folder / "nan.safetensors")
    with pytest.raises(RecipeError, match="the weights to choose gate factors for give outputs that are NaN or Inf"):
        TrainingRun(recipe(f"model.weights={folder}/nan.safetensors")).learner  # noqa: B018


def fake_times(monkeypatch, per_gigamac=1000.0, waste=0.0):
    """Milliseconds in proportion to MACs, and `waste` for each layer with gates."""

    def ms(self, gate_factor):
        network = self._converted(self.network, dict(gate_factor), tuple(self.image.shape[1:]))
        return budget(network, self.image.shape[1:]).macs / 1e9 * per_gigamac + waste * len(dgc_layers(network))

    def options(self, options):
        return [replace(one, costs=one.costs / 1e9 * per_gigamac) for one in options]

    monkeypatch.setattr(TimedNetwork, "ms", ms)
    monkeypatch.setattr(TimedNetwork, "options", options)


def test_a_time_is_come_to_by_measuring_the_whole_network(recipe, monkeypatch):
    """The layers alone miss that gates cost time; the network as a whole tells."""
    fake_times(monkeypatch, waste=0.05)
    dense = TrainingRun(recipe()).cost.macs_dense / 1e6
    one = TrainingRun(recipe(f"model.convert={{target_ms: {0.8 * dense}}}"))
    assert one.learner and one.choice.ms["dense"] == pytest.approx(dense)
    assert one.choice.ms["reached"] == pytest.approx(0.8 * dense, rel=0.02)
    console = Console(record=True, width=60)
    show_choice(console, one.choice)
    assert f"An image takes {one.choice.ms['reached']:.3g} ms deployed like this" in console.export_text()


@pytest.mark.parametrize(
    "target, waste, message",
    [(1e-6, 0, "here, and 5."), (1e5, 0, "here, and 5."), (1e-6, 9, "here, and closing layers saves none")],
)
def test_a_time_out_of_reach_names_the_range(recipe, monkeypatch, target, waste, message):
    fake_times(monkeypatch, waste=waste)
    with pytest.raises(RecipeError) as error:
        TrainingRun(recipe(f"model.convert={{target_ms: {target}}}")).learner  # noqa: B018
    text = str(error.value)
    assert text.startswith(f"model.convert: target_ms={target:g} is out of reach: an image takes ") and message in text


def test_layers_are_timed_as_they_are_deployed(recipe, monkeypatch):
    monkeypatch.setattr("dgc_fastai.training.layer_times.ROUNDS", 1)
    monkeypatch.setattr("dgc_fastai.training.layer_times.BLOCK", 1e-4)
    network = timm.create_model("resnet10t", in_chans=1, num_classes=10).eval()
    settings = recipe().model.convert
    times = TimedNetwork(network, settings, torch.randn(1, 1, 16, 16), lambda _: None)
    options, _ = gate_choice.conversion_options(network, settings, (1, 16, 16))
    found = times.options(options[:2])
    assert [one.name for one in found] == [one.name for one in options[:2]]
    for one, before in zip(found, options):
        assert one.costs.shape == before.costs.shape and (one.costs > 0).all()
    assert times.ms({one.name: 0.5 for one in options}) > 0 < times.ms({})
    assert not dgc_layers(network) and not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_choice_is_shown_in_any_width(width):
    row = {"layer": "layer1.0.downsample.0", "macs_dense": 1769472, "loss_at_half": 0.0123, "gate_factor": 0.34375}
    rows = [{**row, "macs": 608256}, {**row, "layer": "x", "gate_factor": 1.0, "macs": 1769472}]
    console = Console(record=True, width=width)
    show_choice(console, GateChoice({"x": 1.0}, rows, 256))
    text = console.export_text()
    assert "layer1.0.downsample.0" in text and "0.344" in text and "256 training images" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width


def test_a_target_for_which_no_layer_closes_is_refused_in_a_line(recipe):
    with pytest.raises(RecipeError, match="^model.convert: no layer closes for a target so near the dense network"):
        TrainingRun(recipe("model.convert={target: 0.99999}")).learner  # noqa: B018


def test_weights_with_gates_are_no_start_for_another_target(whole, recipe):
    with pytest.raises(CheckpointError, match="has gates; a target starts from the weights of a network without"):
        TrainingRun(recipe(f"model.weights={whole[1]}", "model.convert.target=0.65")).learner  # noqa: B018


def test_runs_that_are_converted_in_two_ways_are_compared(whole, recipe):
    other = recipe("model.convert={gate_factor: 0.5}")
    assert _value(other, "model.convert") == '{"gate_factor": 0.5}'
    console = Console(record=True, width=120)
    show_comparison(console, [whole[1], whole[1]])
    assert "recipe key" not in console.export_text()
