"""How times and memory are measured: order of the calls, arithmetic, waiting for the device, known allocations."""

import torch

from dgc_fastai.analysis.benchmark_plan import plan_benchmark
from dgc_fastai.analysis.timing import peak_memory, summarize
from dgc_fastai.utils import timing
from dgc_fastai.utils.timing import Variant, measure_times
from helpers.benchmarks import tiny

CPU = torch.device("cpu")


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
    monkeypatch.setattr(timing, "MIN_SECONDS", 1.0)
    script = Script(slow=[5, 2, 3], fast=[5, 0.25, 1, 2, 3, 4], instant=[0] * 1000)
    times = measure_times(script.variants, 1, clock=lambda: script.now)
    assert times == {"slow": [3], "fast": [2.5], "instant": [0]}
    assert script.order.count("instant") == 2 + timing.MAX_CALLS


def test_the_timer_waits_for_the_device():
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
