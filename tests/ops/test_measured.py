"""Selection by measurement, with times that the tests make up."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dgc_fastai.ops import BACKENDS, gated_conv2d, measured, select_backend, selection, use_backend
from dgc_fastai.ops.backends.triton import Triton
from dgc_fastai.ops.conv_desc import conv_desc
from dgc_fastai.ops.reference import apply_norm

ONE = (1, 1)
PLAIN = BACKENDS["scaled_inputs"]


class Candidate(type(BACKENDS["scaled_weights"])):
    """Stands for the Triton kernels, and runs on a CPU."""

    name, fuses_norm = "triton", True

    def forward(self, desc, x, gates, weight, norm=None):
        return super().forward(desc, x if norm is None else apply_norm(x, *norm), gates, weight)

    def backward(self, desc, grad, x, gates, weight, norm=None):
        u = x if norm is None else apply_norm(x, *norm)
        gradients = super().backward(desc, grad, u, gates, weight)
        if norm is None:
            return gradients
        passed = gradients.x * (u > 0)
        dscale, dshift = (part.sum((0, 2, 3)) for part in (passed * x, passed))
        return gradients._replace(x=passed * norm.scale.view(1, -1, 1, 1), scale=dscale, shift=dshift)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Measurements on a GPU that does not exist: what they give, what was measured, and where it is kept."""

    class Gpu:
        times, measurements, name, folder = (2.0, 1.0), 0, "A GPU", tmp_path / "cache" / "dgc_fastai"

        def time_steps(self, steps):
            self.measurements += 1
            for step in steps:
                step()
            return list(self.times)

        def restart(self):
            """Forget what only the memory of a process holds."""
            for cache in (measured._layers, measured._stamps):
                cache.clear()
            measured.cache_file.cache_clear()

    gpu = Gpu()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(measured, "time_steps", gpu.time_steps)
    gpu.restart()
    yield gpu
    gpu.restart()


def choose(batch=2, fused=False, candidate=None, dtype=torch.float32, **format):
    x, weight = torch.ones(batch, 6, 5, 4, dtype=dtype).contiguous(**format), torch.ones(4, 6, 3, 3, dtype=dtype)
    desc = conv_desc(x.shape, weight.shape, 2, ONE, ONE, ONE)
    return measured.faster(PLAIN, candidate or Candidate(), desc, x, weight, fused).name


@pytest.mark.parametrize("times, expected", [((2, 1), "triton"), ((1, 2), PLAIN.name), ((1, 0.99), PLAIN.name)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_slower_is_never_chosen(gpu, times, expected, fused):
    gpu.times = times
    assert choose(fused=fused) == choose(fused=fused) == expected and gpu.measurements == 1


def test_each_kind_of_layer_is_measured_by_itself(gpu):
    last = {"memory_format": torch.channels_last}
    for count, case in enumerate([{}, {"fused": True}, {"dtype": torch.bfloat16}, last, {"batch": 5}], 1):
        choose(**case)
        assert gpu.measurements == count
    choose(batch=7)
    assert gpu.measurements == 5, "a smaller last batch is not measured again"


def test_the_next_process_reads_what_this_one_measured(gpu):
    choose()
    gpu.restart()
    gpu.times = (1, 2)
    assert choose() == "triton" and gpu.measurements == 1
    (file,) = gpu.folder.iterdir()
    content = json.loads(file.read_text())
    assert content["gpu"] == "A GPU" and len(content["layers"]) == 1
    assert next(iter(content["layers"].values()))["milliseconds"] == {PLAIN.name: 2, "triton": 1}


def test_other_processes_wait_for_the_file_and_do_not_measure(gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose() == PLAIN.name and gpu.measurements == 0
    mine = dict(measured._layers), dict(measured._stamps)
    gpu.restart()
    monkeypatch.setenv("LOCAL_RANK", "0")
    choose()
    gpu.restart()
    measured._layers.update(mine[0])
    measured._stamps.update(mine[1])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose() == "triton" and gpu.measurements == 1


def test_the_file_is_read_again_only_if_it_has_changed(gpu, monkeypatch):
    choose()
    read, original = [], measured.measured_layers
    monkeypatch.setattr(measured, "measured_layers", lambda file: (read.append(file), original(file))[1])
    monkeypatch.setenv("LOCAL_RANK", "1")
    for _ in range(3):
        choose(fused=True)
    assert len(read) == 1


def test_two_processes_add_to_one_file(gpu):
    choose()
    gpu.restart()
    choose(fused=True)
    gpu.restart()
    choose()
    choose(fused=True)
    assert gpu.measurements == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\x00", b"[]", b'{"layers": 3}', b'{"layers": {"a": 1}}', b'{"layers": {"a": {"backend": 1}}}'],
)
def test_a_damaged_file_is_measured_again_and_rewritten(gpu, content):
    choose()
    (file,) = gpu.folder.iterdir()
    file.write_bytes(content)
    gpu.restart()
    assert choose() == "triton" and gpu.measurements == 2
    gpu.restart()
    assert choose() == "triton" and gpu.measurements == 2


def test_gpus_of_other_names_share_nothing(gpu):
    choose()
    gpu.restart()
    gpu.name = "Another GPU"
    gpu.times = (1, 2)
    assert choose() == PLAIN.name and gpu.measurements == 2


def test_a_folder_that_cannot_be_written_costs_the_file_only(gpu, caplog):
    gpu.folder.parent.write_text("in the way")
    assert choose() == choose() == "triton" and gpu.measurements == 1
    assert "measured again next time" in caplog.text


def test_what_does_not_run_is_not_chosen(gpu, caplog):
    class Broken(Candidate):
        def forward(self, *args):
            raise ValueError("no such instruction\nand more")

    assert choose(candidate=Broken()) == PLAIN.name
    assert ": no such instruction\n" in caplog.text and "more" not in caplog.text


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("part", ["y", "x", "gates", "weight", "scale", "shift"])
@pytest.mark.parametrize("wrong", [lambda one: one * 1.1, lambda one: one * float("nan")], ids=["off", "NaN"])
def test_what_computes_wrong_numbers_is_not_chosen(gpu, caplog, fused, part, wrong):
    if part in ("scale", "shift") and not fused:
        return

    class Wrong(Candidate):
        def forward(self, *args):
            return wrong(super().forward(*args)) if part == "y" else super().forward(*args)

        def backward(self, *args):
            gradients = super().backward(*args)
            return gradients if part == "y" else gradients._replace(**{part: wrong(getattr(gradients, part))})

    assert choose(candidate=Wrong(), fused=fused) == PLAIN.name
    assert "its numbers are wrong by" in caplog.text


def test_a_layer_that_does_not_run_without_being_measured_fails(gpu):
    class Broken(type(PLAIN)):
        def forward(self, *args):
            raise ValueError("broken")

    x, weight = torch.ones(2, 6, 5, 4), torch.ones(4, 6, 3, 3)
    desc = conv_desc(x.shape, weight.shape, 2, ONE, ONE, ONE)
    with pytest.raises(ValueError, match="broken"):
        measured.faster(Broken(), Candidate(), desc, x, weight, False)


def test_measuring_changes_no_random_numbers_and_sees_none_that_are_nan(gpu, monkeypatch):
    class Sees(Candidate):
        def forward(self, desc, x, gates, weight, norm=None):
            assert x.isfinite().all() and weight.isfinite().all()
            return super().forward(desc, x, gates, weight, norm)

    before = torch.get_rng_state()
    x, weight = torch.full((2, 6, 5, 4), float("nan")), torch.full((4, 6, 3, 3), float("nan"))
    desc = conv_desc(x.shape, weight.shape, 2, ONE, ONE, ONE)
    assert measured.faster(PLAIN, Sees(), desc, x, weight, True).name == "triton"
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_that_is_missing_now_decides_for_this_process_only(gpu, monkeypatch):
    def out_of_memory(steps):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measured, "time_steps", out_of_memory)
    assert choose() == PLAIN.name and not gpu.folder.exists()
    monkeypatch.setattr(measured, "time_steps", gpu.time_steps)
    assert choose() == PLAIN.name and gpu.measurements == 0, "not once more in every step"
    gpu.restart()
    assert choose() == "triton"


def test_nothing_is_measured_while_a_graph_is_captured_or_a_mode_watches(gpu, monkeypatch):
    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **kwargs or {})

    with Watching():
        assert choose() == PLAIN.name
    torch.vmap(lambda x: [choose(), x][1])(torch.ones(2))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == PLAIN.name and gpu.measurements == 0


def test_fake_tensors_need_no_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("asked for the GPU"))
    with FakeTensorMode():
        x, weight = torch.empty(2, 6, 5, 5, device="cuda"), torch.empty(4, 6, 3, 3, device="cuda")
        desc = conv_desc(x.shape, weight.shape, 2, ONE, ONE, ONE)
        assert select_backend(desc, x, x.new_empty(2, 2, 6), weight).name == "cudnn"
        assert selection.fuses_norm(x, weight, 2, ONE, ONE, ONE)
    assert gpu.measurements == 0


def test_the_layer_and_the_operator_follow_the_measurement(monkeypatch):
    """The layer asks with the type that autocast will cast to; the answer for it says whether the norm is fused."""
    asked = []

    def fake_faster(plain, candidate, desc, x, weight, fused):
        asked.append((x.dtype, weight.dtype, fused))
        return candidate

    monkeypatch.setattr(selection, "faster", fake_faster)
    monkeypatch.setattr(Triton, "is_supported", lambda *args: True)
    with FakeTensorMode():
        x, weight = torch.empty(2, 6, 5, 5, device="cuda"), torch.empty(4, 6, 3, 3, device="cuda")
        assert selection.fuses_norm(x, weight, 2, ONE, ONE, ONE)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)  # a build without CUDA refuses it
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
        assert selection.fuses_norm(x, weight, 2, ONE, ONE, ONE)
        assert select_backend(conv_desc(x.shape, weight.shape, 2, ONE, ONE, ONE), x, x, weight, True).name == "triton"
        for name, expected in (("scaled_inputs", False), ("triton", True)):
            with use_backend(name):
                assert selection.fuses_norm(x, weight, 2, ONE, ONE, ONE) == expected
    assert asked == [(torch.float32, torch.float32, True), (torch.bfloat16,) * 2 + (True,)] + asked[:1]


def test_a_cpu_needs_no_measurement(monkeypatch):
    monkeypatch.setattr(selection, "faster", lambda *args: pytest.fail("measured on a CPU"))
    x, weight = torch.randn(2, 6, 5, 5), torch.randn(4, 6, 3, 3)
    assert not selection.fuses_norm(x, weight, 2, ONE, ONE, ONE)
    gated_conv2d(x, torch.rand(2, 2, 6), weight, None, None, ONE, ONE, ONE)
