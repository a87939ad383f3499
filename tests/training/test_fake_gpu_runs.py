"""Whole runs on a GPU, built as a recipe builds them, where there is none: the fake one refuses mixed devices, counts
what the host waits for, and shows which types and memory formats the layers see."""

import json

import pytest
import torch
from torch import Tensor

from dgc_fastai.layers.gate_schedule import dgc_layers
from helpers.datasets import write_imagenet
from helpers.fake_gpu import fake_gpu
from helpers.fake_training import counted_fit
from helpers.families import small

TINY = "model.stages=[1,1]", "model.growth=[4,4]"
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SYNCS = {"float32": 3, "bf16": 3, "fp16": 5}
CASES = [
    ("dgc_densenet86", "float32", None),
    ("dgc_densenet86", "fp16", "triton"),
    ("dgc_condensenet74", "bf16", "triton"),
    ("dgc_resnet18", "bf16", None),
    ("dgc_resnet18", "float32", "triton"),
    ("dgc_resnet50", "fp16", None),
    ("dgc_resnet50", "bf16", "triton"),
    ("dgc_mobilenetv2_100", "fp16", None),
    ("dgc_mobilenetv2_100", "bf16", "triton"),
]


@pytest.fixture(autouse=True)
def gpu():
    with fake_gpu() as one:
        yield one


def no_syncs_in_layers(counts):
    return not [place for place in counts.places if place.startswith(("dgc_fastai/layers", "dgc_fastai/ops"))]


class Outputs:
    """Types and formats of what DGC layers read and return."""

    def __init__(self, model):
        self.seen = []
        for layer in dgc_layers(model):
            layer.register_forward_hook(self.hook)

    def hook(self, layer, inputs, output: Tensor):
        self.seen.append((layer.training, inputs[0], output))


def shrink(monkeypatch, name):
    """Let recipes make a small network of a family."""
    model = lambda *args: small(name, in_chans=1)  # noqa: E731
    monkeypatch.setattr("dgc_fastai.training.run.create_unconverted", model)
    return f"model.arch={name}", "data.size=32", "model.stages=null", "model.growth=null"


@pytest.mark.parametrize("name, precision, backend", CASES)
def test_every_family_trains_and_validates(gpu, monkeypatch, name, precision, backend):
    if backend:
        pytest.importorskip("triton")
    overrides = shrink(monkeypatch, name)
    last = precision == "bf16"
    more = f"train.precision={precision}", f"train.channels_last={json.dumps(last)}"
    run = counted_fit(gpu, *overrides, *more, watch=Outputs, backend=backend)
    assert run.train.syncs <= MAX_SYNCS[precision] and no_syncs_in_layers(run.train)
    assert run.valid.syncs <= 4 and no_syncs_in_layers(run.valid)
    assert run.train.triton or not backend
    assert {training for training, *_ in run.watched.seen} == {True, False}
    for _, x, y in run.watched.seen:
        assert y.is_cuda and y.dtype == TYPES[precision]
        assert not last or y.is_contiguous(memory_format=torch.channels_last) or not x.is_contiguous()
    assert run.gradients == {weight.dtype for weight in run.learn.model.parameters()} == {torch.float32}


# What each option adds: to the recipe, and to the synchronizations of a step of training.
OPTIONS = {
    "mixup": (["train.mixup=0.2"], 0),
    "cutmix": (["train.cutmix=1.0"], 0),
    "mixup and cutmix": (["train.mixup=0.2", "train.cutmix=1.0"], 0),
    "accumulate": (["train.accumulate=2", "data.batch_size=479"], 0),
    "clip": (["train.clip=1.0"], 0),
    "ema": (["train.ema=0.99"], 0),
    "skip": (["train.nonfinite=skip"], 0),
    "memory efficient": (["model.memory_efficient=true", "train.channels_last=true"], 0),
    "sgd": (["train.optimizer=sgd", "train.decay_norms=false", "train.label_smoothing=0.1"], 0),
    "random erasing": (["data.augment=[crop_flip,random_erasing]"], 0),
    "rand augment": (["data.augment=[rand_augment]"], 60),  # torchvision's operations make tensors of numbers
    "trivial augment": (["data.augment=[trivial_augment]"], 60),
    "all": (
        [
            *("train.mixup=0.2", "train.accumulate=2", "train.clip=1.0", "train.ema=0.9", "train.nonfinite=skip"),
            *("model.memory_efficient=true", "train.channels_last=true", "train.precision=fp16", "data.batch_size=479"),
        ],
        2,  # as all fp16
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_validates(gpu, name):
    overrides, more = OPTIONS[name]
    run = counted_fit(gpu, *TINY, *overrides)
    assert run.train.syncs <= 3 + more and no_syncs_in_layers(run.train), run.train.places
    assert run.valid.syncs <= 4 and no_syncs_in_layers(run.valid), run.valid.places


@pytest.mark.parametrize("precision", TYPES)
def test_image_files_train_and_validate(gpu, tmp_path, precision):
    folder = write_imagenet(tmp_path / "images", train=8)
    data = f"data.path={folder}", "data.name=imagenet", "data.size=32", "data.batch_size=12"
    run = counted_fit(gpu, *TINY, *data, f"train.precision={precision}")
    assert run.train.syncs <= MAX_SYNCS[precision] and no_syncs_in_layers(run.train), run.train.places
