"""The benchmark: what is timed, in which order, against what; the arithmetic; the memory; its two files."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from dgc_fastai import load_recipe
from dgc_fastai.analysis import benchmark, throughput, timing
from dgc_fastai.analysis.benchmark import family, plan_benchmark
from dgc_fastai.analysis.benchmark_report import _data_verdict, _decimals, _rounded, draw_benchmark, measuring_bar
from dgc_fastai.analysis.throughput import loader_name, worker_counts
from dgc_fastai.analysis.timing import Variant, measure_times, peak_memory, summarize
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.layers.gate_schedule import dgc_layers
from dgc_fastai.ops import gated_conv2d as ops
from dgc_fastai.recipe.schema import ARCHITECTURES
from helpers import QUICKSTART
from helpers.command_line import only
from helpers.datasets import write_imagenet
from helpers.golden import equal_states

TINY = "model.stages=[1,1]", "model.growth=[4,4]", "data.batch_size=4", "device=cpu"
GATED = [f"{name} at {progress}" for name in ("reference", "ours") for progress in ("0", "0.5", "1")]
TRAINING = ["dense", "sgc", *GATED, "dense again"]
DEPLOYED = ["dense channels-last", "deployed", "dense compiled", "deployed compiled"]
INFERENCE = ["dense", "sgc", "reference at 1", "ours at 1", *DEPLOYED, "dense again"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1e-3)


def tiny(*overrides):
    return load_recipe(QUICKSTART, [*TINY, *overrides])


def networks(monkeypatch):
    """The networks that a plan is going to build, by name."""
    built, build = {}, benchmark.build_model

    def spy(recipe, classes):
        built[recipe.model.arch] = build(recipe, classes)
        return built[recipe.model.arch]

    monkeypatch.setattr(benchmark, "build_model", spy)
    return built


# What is measured -----------------------------------------------------------------------------------------


def test_a_benchmark_leaves_a_table_and_two_files(app, tmp_path):  # noqa: F811
    text = app("benchmark", QUICKSTART, *TINY, "model.arch=dgc_densenet22_sgc", f"output={tmp_path}", "--rounds", "2")
    folder = only(tmp_path)
    assert folder.name.startswith("benchmark-quickstart-2")
    assert f"benchmark.json and benchmark.png are in {folder}." in text.replace("\n", " ")
    assert sorted(os.listdir(folder)) == ["benchmark.json", "benchmark.png"]
    report = json.loads((folder / "benchmark.json").read_text())
    what = [(one["what"], one["batch"]) for one in report["measurements"]]
    assert what == [("training step", 4), ("inference", 1), ("inference", 4)]
    for measurement, names in zip(report["measurements"], [TRAINING, INFERENCE, INFERENCE]):
        rows = measurement["variants"]
        assert [row["name"] for row in rows] == names
        for row in rows:
            assert len(row["ms"]) == 2 and min(row["ms"]) > 0
            assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
            assert (row["peak_bytes"] is None) == (measurement["what"] == "inference")
        assert rows[0]["ratio"] == {"median": 1, "min": 1, "max": 1}
    for found in (measurement["speedup"] for measurement in report["measurements"][1:]):
        assert found["of"].startswith("deployed") and found["over"].startswith("dense") and found["median"] > 0
    assert " ".join(text.split()).count("the fastest dense form") == 2
    peaks = {row["name"]: row["peak_bytes"] for row in report["measurements"][0]["variants"]}
    assert peaks["dense"] == peaks["dense again"] > 0 and peaks["reference at 1"] > peaks["dense"]
    assert report["recipe"]["model"]["arch"] == "dgc_densenet22_sgc" and report["rounds"] == 2
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["device"] == "cpu"
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.size[0] > 800
    for name in {*TRAINING, *INFERENCE}:
        assert name in text
    assert "Noise, the dense twin against itself: " in text and max(map(len, text.splitlines()[:-1])) <= 80


@pytest.mark.parametrize("only, count", [("training", 1), ("inference", 2)])
def test_one_half_of_it(app, tmp_path, only, count):  # noqa: F811
    app("benchmark", QUICKSTART, *TINY, f"--out={tmp_path}", "--rounds=1", "--no-compile", f"--only={only}")
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert [one["what"].split()[0] for one in report["measurements"]] == [only] * count
    assert "wrong" in app("benchmark", QUICKSTART, "--only=wrong", expect=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_data_pipeline_by_itself(app, tmp_path, monkeypatch, workers):  # noqa: F811
    monkeypatch.setattr(throughput, "SECONDS", 0.0)
    write_imagenet(tmp_path / "data", train=3)
    path = "data.name=folder", f"data.path={tmp_path}/data", "data.size=16", f"data.workers={workers}"
    out = tmp_path / "out"
    text = app("benchmark", QUICKSTART, *TINY, *path, f"--out={out}", "--rounds=2", "--only=data")
    report = json.loads((out / "benchmark.json").read_text())
    assert report["measurements"] == [] and report["rounds"] == 2
    data, loaders = report["data"], [loader_name(count) for count in worker_counts(workers)]
    assert {"loader, 0 workers", f"loader, {workers} worker{'s' * (workers > 1)}"} <= set(loaders)
    steps = [f"training step, {name}" for name in ("dense", "ours at 0.5")]
    parts = ["decode, one thread", "decode and augment, one thread"]
    assert [row["name"] for row in data["sources"]] == [*steps, *parts, *loaders]
    for row in data["sources"]:
        assert len(row["rates"]) == 2 and 0 < row["min"] <= row["median"] <= row["max"] and row["name"] in text
    rates = {row["name"]: row["median"] for row in data["sources"]}
    assert (data["workers"], data["batch"]) == (workers, 4)
    assert data["taken"] == rates[steps[1]] and data["given"] == rates[loader_name(workers)]
    assert data["limit"] == ("data" if data["given"] < data["taken"] else "network")
    assert "images/s, the data gives" in " ".join(text.split())
    with Image.open(out / "benchmark.png") as picture:
        assert picture.size[0] > 800


def test_the_data_pipeline_of_a_small_set_and_of_none(app, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(throughput, "SECONDS", 0.0)
    app("benchmark", QUICKSTART, *TINY, "data.workers=2", f"--out={tmp_path}", "--rounds=1", "--only=data")
    data = json.loads((tmp_path / "benchmark.json").read_text())["data"]
    assert [row["name"] for row in data["sources"]][2:] == ["loader, 0 workers"] and data["workers"] == 0
    text = app("benchmark", QUICKSTART, "data.name=folder", "data.path=nowhere", "--only=data", expect=2)
    assert text.startswith("error: data.path: there is no folder nowhere")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_image_that_the_clock_has_seen_is_counted(tmp_path, monkeypatch, workers):
    write_imagenet(tmp_path, train=4)
    (tmp_path / "train/n01/n01_0.JPEG").write_bytes(b"")
    recipe = tiny("data.name=folder", f"data.path={tmp_path}", "data.size=16", "data.unreadable=skip")

    def count(batch_size):
        waits = []
        data = recipe.data.model_copy(update={"batch_size": batch_size, "workers": workers})
        train = build_dataloaders(data, CPU).train
        images, seconds = throughput.read(train, lambda: waits.append(1))
        assert 0 < seconds < 60
        return images, len(waits)

    monkeypatch.setattr(throughput, "SECONDS", 60.0)
    assert count(6) == (11, 2)  # too few batches to leave some out
    (tmp_path / "train/n01/n01_0.JPEG").unlink()
    assert count(1) == (11 - workers, 11)  # but for the first of each worker
    monkeypatch.setattr(throughput, "SECONDS", 0.0)
    assert count(1) == (1 + 2 * workers, 1 + 3 * workers)
    (tmp_path / "train/n01/n01_0.JPEG").write_bytes(b"")
    decode, augment, *_ = throughput.pipeline_sources(recipe, CPU, lambda: None)
    assert decode.run()[0] == augment.run()[0] == 11


def test_rates_are_taken_in_turn_after_a_round_that_warms_up():
    order, seconds = [], iter([9, 9, 1, 2, 4, 5])

    def source(name, images):
        return throughput.Source(name, lambda: order.append(name) or (images, next(seconds)))

    first, second = throughput.measure_rates([source("a", 10), source("b", 20)], 2, lambda name: None)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert first == {"name": "a", "median": 3.75, "min": 2.5, "max": 5, "rates": [5, 2.5]}
    assert second["rates"] == [20, 4]


@pytest.mark.parametrize(
    "given, limit, enough, words",
    [([5, 8, 30], "data", 2, "8 with 1 worker: the data is what limits; 2 would be enough."),
     ([5, 8, 9], "data", None, "8 with 1 worker: the data is what limits."),
     ([5, 20, 9], "network", None, "20 with 1 worker: the data is not what limits.")],
)  # fmt: skip
def test_the_verdict(monkeypatch, given, limit, enough, words):
    monkeypatch.setattr(throughput, "worker_counts", lambda own: [0, 1, 2])
    rows = [{"name": loader_name(count), "median": rate} for count, rate in enumerate(given)]
    found = throughput.verdict([{"name": "net", "median": 10}, *rows], "net", 1)
    assert found["limit"] == limit and (limit == "network" or found["enough"] == enough)
    assert _data_verdict(found | {"workers": 1}) == f"The network takes 10 images/s, the data gives {words}"


def test_a_twin_s_recipe_is_benchmarked_as_its_family(monkeypatch):
    assert all(
        family(name) in ARCHITECTURES and "_" not in family(name)[4:].replace("_100", "") for name in ARCHITECTURES
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
    formula, reference = [], ops.reference.gated_conv2d
    monkeypatch.setattr(ops.reference, "gated_conv2d", lambda *args: formula.append(1) or reference(*args))
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
    assert ops._forced is None


def test_the_fastest_of_each_are_compared():
    times = {"dense": [9, 9, 9], "ours at 1": [1, 1, 1], "dense compiled": [6, 8, 7], "deployed": [4, 2, 7]}
    found = benchmark.speedup(summarize(times | {"deployed compiled": [5, 5, 5], "dense again": [9, 9, 9]}, {}))
    assert found == {"speedup": {"of": "deployed", "over": "dense compiled", "median": 1.5, "min": 1, "max": 4}}
    assert benchmark.speedup(summarize({"dense": [1.0]}, {})) == {}


def test_deployed_forms_say_what_the_networks_say(monkeypatch):
    built = networks(monkeypatch)
    said = []
    monkeypatch.setattr(benchmark, "_infer", lambda recipe, network, images: said.append(network(images)))
    (_, one, many) = plan_benchmark(tiny(), compiled=False)
    for variants in (one.variants, many.variants):
        found = {}
        for variant in variants:
            with variant.setting(), torch.no_grad():
                variant.call()
                found[variant.name] = said.pop()
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
    build = benchmark.build_model
    monkeypatch.setattr(
        benchmark,
        "build_model",
        lambda recipe, count: classes.update({recipe.data.name: count}) or build(recipe, count),
    )
    for name in ("digits", "cifar10", "cifar100", "folder"):
        path = () if name == "digits" else (f"data.path={tmp_path}/nowhere",)
        plan = plan_benchmark(tiny(f"data.name={name}", "data.size=16", "data.batch_size=1", *path))
        assert [(one.what, one.batch) for one in plan] == [("training step", 1), ("inference", 1)]
    assert classes == {"digits": 10, "cifar10": 10, "cifar100": 100, "folder": 1000}


# How it is measured ---------------------------------------------------------------------------------------


class Script:
    """Variants that take the seconds that a script says, on a clock of their own."""

    def __init__(self, **seconds):
        self.now, self.order, self.inside = 0.0, [], []
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.variants = [
            Variant(name, lambda name=name: self.setting(name), lambda name=name: self.call(name)) for name in seconds
        ]

    def setting(self, name):
        script = self

        class Setting:
            def __enter__(self):
                script.now += 1000  # not to be seen in any time
                script.inside.append(name)

            def __exit__(self, *_):
                script.inside.remove(name)

        return Setting()

    def call(self, name):
        assert self.inside == [name]
        self.order.append(name)
        self.now += next(self.seconds[name])


def test_times_ratios_and_order():
    # Each is called twice to warm up, and that counts nowhere.
    script = Script(dense=[9, 9, 1, 2, 4], gated=[9, 9, 3, 2, 5], again=[9, 9, 1, 1, 6])
    times = measure_times(script.variants, 3, clock=lambda: script.now)
    assert times == {"dense": [1, 2, 4], "gated": [3, 2, 5], "again": [1, 1, 6]}
    forth = ["dense", "gated", "again"]
    warm_up = [name for name in forth for _ in range(2)]
    assert script.order == warm_up + forth[::-1] + forth + forth[::-1]
    dense, gated, again = summarize(times, {"dense": 5, "gated": 7})
    assert dense["ratio"] == {"median": 1, "min": 1, "max": 1} and dense["median_ms"] == 2000
    assert gated["ratio"] == {"median": 1.25, "min": 1, "max": 3}  # not 3000 / 2000: of 3/1, 2/2, 5/4
    assert gated["median_ms"] == 3000 and gated["ms"] == [3000, 2000, 5000] and gated["peak_bytes"] == 7
    assert again["ratio"] == {"median": 1, "min": 0.5, "max": 1.5} and again["peak_bytes"] is None


def test_what_is_fast_is_called_several_times(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 1.0)
    script = Script(slow=[5, 2, 3], fast=[5, 0.25, 1, 2, 3, 4], instant=[0] * 1000)
    times = measure_times(script.variants, 1, clock=lambda: script.now)
    assert times == {"slow": [3], "fast": [2.5], "instant": [0]}
    assert script.order.count("instant") == 2 + timing.MOST_CALLS


def test_the_clock_waits_for_the_device():
    pending, now = [], [0.0]

    def wait():
        now[0] += sum(pending)
        pending.clear()

    lazy = Variant("lazy", lambda: Script().setting("lazy"), lambda: pending.append(3.0))
    assert measure_times([lazy], 2, wait, clock=lambda: now[0]) == {"lazy": [3, 3]}


def test_peak_memory_of_known_allocations():
    def call():
        first = torch.empty(1000, 1000)  # 4 MB
        second = torch.empty(500, 1000)  # 6 MB
        del first  # 2 MB
        third = torch.empty(750, 1000, dtype=torch.float64)  # 8 MB
        del second, third
        return torch.empty(10)

    assert peak_memory(call, CPU) == 8_000_000
    held = torch.empty(1000, 1000)
    assert peak_memory(lambda: None, CPU) == 0
    assert peak_memory(lambda: held.abs_(), CPU) == 0  # in place
    assert peak_memory(lambda: held.exp(), CPU) == 4_000_000
    held.requires_grad_()
    # The backward needs what each exp returned, 4 MB, and makes a gradient of as much of the second first.
    peak = peak_memory(lambda: torch.autograd.grad(held.exp().exp().sum(), held), CPU)
    assert 12_000_000 <= peak < 12_000_100
    assert peak_memory(lambda: None, torch.device("mps")) is None


def test_peak_memory_says_nothing_on_the_terminal(capfd):
    (plan, *_) = plan_benchmark(tiny())
    for variant in plan.variants[-2:]:
        with variant.setting():
            variant.call()
        with variant.setting():
            peak_memory(variant.call, CPU)
    assert capfd.readouterr() == ("", "")


# What is told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, noise, text",
    [(1234.0, 0.2, "1,200"), (1234.0, 0.05, "1,230"), (1234.0, 0.0, "1,230"), (12.34, 0.05, "12.3"),
     (12.34, 0.2, "12"), (0.1234, 0.05, "0.123"), (0.0, 0.1, "0"), (7.2, 9.0, "7"), (72.0, 0.5, "70"),
     (99.96, 0.001, "100.0")],
)  # fmt: skip
def test_no_more_digits_than_the_noise_leaves(value, noise, text):
    assert _rounded(value, _decimals(value, noise)) == text


def test_the_picture_takes_whatever_was_measured():
    def row(name, peak=1):
        return {"name": name, "median_ms": 1.0, "peak_bytes": peak, "ratio": {"median": 1.0, "min": 0.9, "max": 1.2}}

    for peak, batches in ((None, [1]), (1, [1, 8])):
        measured = [{"what": "training step", "batch": 8, "variants": [row(name, peak) for name in TRAINING]}]
        measured += [{"what": "inference", "batch": n, "variants": [row(n) for n in INFERENCE]} for n in batches]
        recipe = {
            "model": {"arch": "dgc_resnet18"},
            "train": {"precision": "bf16", "channels_last": True, "compile": True},
        }
        machine = {"processor": "GPU", "device": "cuda", "torch": "2"}
        for some in (measured, measured[:1], measured[1:]):
            report = {"name": "x", "measurements": some, "recipe": recipe, "machine": machine, "rounds": 1}
            assert draw_benchmark(report).startswith(b"\x89PNG")


def test_a_bar_on_a_terminal_moves_only_when_told():
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    with measuring_bar(Console(file=screen, force_terminal=True, width=100), 3) as show:
        for number in range(3):
            show("training step", f"variant {number}")
    assert all(f"training step: variant {number}" in screen.getvalue() for number in range(3))
    assert "0/3" in screen.getvalue() and "2/3" in screen.getvalue() and "4/3" not in screen.getvalue()
    with measuring_bar(Console(file=(silent := StringIO()), force_terminal=False), 1) as show:
        show("training step", "dense")
    assert silent.getvalue().strip() == ""


def test_what_is_measured_before_an_interrupt_is_kept(monkeypatch, tmp_path):
    from rich.console import Console

    recipe = tiny()
    for after, left in ((0, []), (2, ["out", "out/benchmark.json"])):
        plan = plan_benchmark(recipe, compiled=False)[::-1]  # inference is the quicker

        def interrupt():
            raise KeyboardInterrupt

        plan[after] = plan[after]._replace(variants=[plan[after].variants[0]._replace(call=interrupt)])
        folder = benchmark.benchmark_folder(recipe, tmp_path / "out")
        with pytest.raises(KeyboardInterrupt):
            benchmark.benchmark(recipe, plan, folder, 1, Console(quiet=True))
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left
    assert len(json.loads((folder / "benchmark.json").read_text())["measurements"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "Must be >= 1"),
        (["--out", "file/below"], "--out: cannot make the folder file/below: Not a directory"),
        (["--out", "file"], "--out: cannot make the folder file: File exists"),
        (["output=file"], "output: cannot make the folder file/benchmark-quickstart-"),
        (["model.heads=3"], "model: heads=3 does not divide"),
        (["train.optimizer=sdg"], "train.optimizer: timm has no 'sdg'; did you mean 'sgd'?"),
        (["train.precision=fp16"], "train.precision: fp16 needs a CUDA device"),
        (["train.compile=true"], "train.compile: torch.compile needs a C++ compiler, and there is no no-compiler"),
        ([], "--compile: torch.compile needs a C++ compiler, and there is no no-compiler"),
        (["train.epoch=3"], "did you mean 'epochs'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(app, tmp_path, monkeypatch, arguments, message):  # noqa: F811
    (tmp_path / "file").touch()
    if not arguments or "train.compile=true" in arguments:
        monkeypatch.setenv("CXX", "no-compiler")
    text = app("benchmark", QUICKSTART, *TINY, *arguments, cwd=tmp_path, expect=2)
    assert text.startswith("error: ") and text.count("\n") == 1 and message in text, text
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_of_somebody_else_s_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match="--out: .* is not writable; name a folder of yours"):
        benchmark.benchmark_folder(tiny(), Path(tmp_path))
