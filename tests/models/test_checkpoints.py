"""Weights in and out: the reference's files, ours, and files that are neither."""

import json
import os
import pickle
import random
import struct

import pytest
import timm
import torch

from dgc_fastai import CheckpointError, load_checkpoint, save_checkpoint, set_progress
from dgc_fastai.utils.errors import WriteError
from dgc_fastai.utils.files import write_atomically
from helpers import QUICKSTART
from helpers.corruption import other_byte
from helpers.golden import DATA, close, equal_states, group, make_state, read, read_json, tiny_densenet

PUBLISHED = {
    "cifar10_dydensenet86_h4": ("dgc_densenet86", 10),
    "cifar100_dydensenet86_h4": ("dgc_densenet86", 100),
    "imagenet_dydensenet_h4": ("dgc_condensenet74", 1000),
    "imagenet_dyresnet18_h4": ("dgc_resnet18", 1000),
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Writes the stand-in for a published checkpoint, in the container of the published files."""
    folder = tmp_path_factory.mktemp("published")

    def write(name):
        path = folder / f"{name}.tar"
        if not path.exists():
            state = {"state_dict": make_state(name), "epoch": 119, "best_prec1": 0.0}
            # The published files were written by a torch of 2020.
            torch.save(state, path, _use_new_zipfile_serialization="cifar" in name)
        return path

    return write


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_load_and_give_the_reference_s_logits(name, stand_in):
    arch, classes = PUBLISHED[name]
    model = load_checkpoint(timm.create_model(arch, num_classes=classes), stand_in(name)).eval()
    for layer in model.modules():
        if hasattr(layer, "inactive_channels"):
            assert layer.inactive_channels == round(layer.in_channels * (1 - layer.gate_factor))
    if (DATA / f"{name}.io.safetensors").exists():
        golden, _ = read(f"{name}.io.safetensors")
        size = 32 if "cifar" in name else 224
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            close(model(images), golden["eval.logits"], 1e-5)


def test_every_tensor_of_a_published_checkpoint_is_used():
    for name, (arch, classes) in PUBLISHED.items():
        model = timm.create_model(arch, num_classes=classes)
        published = read_json("published_checkpoint_shapes.json")[name]
        numbers = sum(torch.Size(shape).numel() for shape in published.values())
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == numbers


def test_the_reference_s_own_run_gives_its_final_logits():
    golden, _ = read("tiny_dydensenet.safetensors")
    model = load_checkpoint(tiny_densenet(), DATA / "tiny_dydensenet.pth.tar").eval()
    with torch.no_grad():
        close(model(golden["images"][0]), golden["eval.logits_of_batch_0"], 1e-5)


def test_the_reference_s_names_without_their_container(tmp_path):
    golden, _ = read("tiny_dydensenet.safetensors")
    torch.save(group(golden, "init."), tmp_path / "init.pth")
    model = load_checkpoint(tiny_densenet(), tmp_path / "init.pth")
    assert torch.equal(model.stem.weight, golden["init.features.init_conv.weight"])


def test_ours_round_trip_with_progress_and_in_any_memory_format(tmp_path):
    model = tiny_densenet().to(memory_format=torch.channels_last)
    set_progress(model, 1)
    save_checkpoint(model, tmp_path / "any.name", {"recipe": "name: x"})
    loaded = load_checkpoint(tiny_densenet(), tmp_path / "any.name")
    assert equal_states(loaded.state_dict(), model.state_dict())
    assert loaded.stages[0].layers[0].conv1.inactive_channels == 12
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    assert equal_states(load_checkpoint(tiny_densenet(), tmp_path / "ours.pth").state_dict(), model.state_dict())
    assert os.listdir(tmp_path).count("any.name") == 1 and len(os.listdir(tmp_path)) == 2  # no temporary is left


def refused(path, model=None):
    model = model or tiny_densenet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, path)
    assert equal_states(model.state_dict(), before), "a refused checkpoint left its traces"
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def recipe_of(arch):
    return {"recipe": QUICKSTART.read_text().replace("arch: dgc_densenet86, stages: [4, 4, 4]", f"arch: {arch}")}


@pytest.mark.parametrize("arch", ["dgc_resnet18", "dgc_resnet18_dense", "dgc_densenet22"])
def test_weights_of_a_run_of_another_network_are_refused_by_its_name(arch, tmp_path):
    path = tmp_path / "best.safetensors"
    save_checkpoint(tiny_densenet(), path, recipe_of("dgc_densenet86"))
    message = refused(path, timm.create_model(arch))
    assert message == f"{path}: holds weights of dgc_densenet86, which do not fit {arch}"


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param(recipe_of("dgc_densenet86"), id="same name"),
        pytest.param(None, id="no metadata"),
        pytest.param({"classes": "[]"}, id="no recipe"),
        pytest.param({"recipe": "name: ["}, id="no YAML"),
        pytest.param({"recipe": "name: x"}, id="recipe without a network"),
    ],
)
def test_tensors_are_listed_where_the_names_of_the_networks_do_not_explain_it(metadata, tmp_path):
    save_checkpoint(tiny_densenet(), tmp_path / "tiny.safetensors", metadata)
    other = timm.create_model("dgc_densenet86", num_classes=10)
    assert "missing (stages.0.layers.2.conv1." in refused(tmp_path / "tiny.safetensors", other)


def test_weights_that_fit_are_loaded_whatever_their_network_is_called(tmp_path):
    save_checkpoint(tiny_densenet(), tmp_path / "x.safetensors", recipe_of("dgc_resnet18"))
    load_checkpoint(tiny_densenet(), tmp_path / "x.safetensors")


def test_other_networks_are_refused_by_name_of_what_differs(tmp_path, stand_in):
    save_checkpoint(tiny_densenet(), tmp_path / "tiny.safetensors")
    other = timm.create_model("dgc_densenet86", num_classes=10)
    assert "missing (stages.0.layers.2.conv1." in refused(tmp_path / "tiny.safetensors", other)
    cifar100 = timm.create_model("dgc_densenet86", num_classes=100)
    message = refused(stand_in("cifar10_dydensenet86_h4"), cifar100)
    assert "2 of another shape (classifier.weight [10, 800] for [100, 800]" in message
    assert "unexpected" in refused(stand_in("cifar10_dydensenet86_h4"), timm.create_model("dgc_resnet18"))


@pytest.mark.parametrize("name", ["stem.weight", "stages.1.layers.0.conv1.inactive_channels"])
def test_a_missing_tensor_is_refused(name, tmp_path):
    state = tiny_densenet().state_dict()
    del state[name]
    torch.save(state, tmp_path / "x.pth")
    assert f"1 missing ({name})" in refused(tmp_path / "x.pth")


def test_a_head_or_a_number_that_cannot_be_is_refused(tmp_path):
    content = torch.load(DATA / "tiny_dydensenet.pth.tar", weights_only=True)
    state = content["state_dict"]
    for key in [key for key in state if "headconv_3" in key]:
        del state[key]
    torch.save(content, tmp_path / "three_heads.pth")
    assert "of another shape" in refused(tmp_path / "three_heads.pth")
    state = tiny_densenet().state_dict()
    state["stages.0.layers.0.conv1.inactive_channels"].fill_(16)
    torch.save(state, tmp_path / "all.pth")
    assert "inactive_channels is 16, of 16 channels" in refused(tmp_path / "all.pth")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_files_cut_short_anywhere_are_refused(kind, tmp_path):
    whole = tmp_path / "whole"
    if kind == "safetensors":
        save_checkpoint(tiny_densenet(), whole)
    else:
        torch.save(tiny_densenet().state_dict(), whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    chance = random.Random(0)
    for length in (0, 1, 8, 9, 100, len(content) - 1, *(chance.randrange(len(content)) for _ in range(50))):
        (tmp_path / "cut").write_bytes(content[:length])
        assert "cannot read the checkpoint" in refused(tmp_path / "cut")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    for content in (b"hello, this is a text file", b"\x08\0\0\0\0\0\0\0{}      ", os.urandom(1000)):
        (tmp_path / "x").write_bytes(content)
        assert "does not fit" in (message := refused(tmp_path / "x")) or "cannot read" in message
    torch.save({"state_dict": {}}, tmp_path / "empty")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"epoch": 3}, tmp_path / "number")
    for name in ("empty", "list", "number"):
        assert "no state_dict" in refused(tmp_path / name)
    assert "No such file" in refused(tmp_path / "nowhere")
    assert "directory" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_one_wrong_byte_in_the_header_is_told_or_harmless(kind, tmp_path):
    whole, model, before = tmp_path / "whole", tiny_densenet(), tiny_densenet().state_dict()
    if kind == "safetensors":
        save_checkpoint(tiny_densenet(), whole)
        end = 8 + struct.unpack("<Q", whole.read_bytes()[:8])[0]
    else:
        torch.save(tiny_densenet().state_dict(), whole, _use_new_zipfile_serialization=kind == "zip")
        end = 2000
    chance, told = random.Random(0), 0
    model.load_state_dict(before)
    for _ in range(50):
        (tmp_path / "wrong").write_bytes(other_byte(chance, whole.read_bytes(), end))
        try:
            load_checkpoint(model, tmp_path / "wrong")
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        except CheckpointError as error:
            assert str(error).startswith(f"{tmp_path / 'wrong'}: ") and "\n" not in str(error)
            assert equal_states(model.state_dict(), before)
            told += 1
        model.load_state_dict(before)
    assert told > 25


def test_headers_of_safetensors_that_cannot_be(tmp_path):
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header in (
        b"{", b"{}", b"{]", b"{" * 5000, b'{"x": NaN}', b'{"x": 3}', b'{"x": {"dtype": "F32"}}',
        b'{"__metadata__": {"a": 3}}', b'{"x": %s, "x": %s}' % (2 * (json.dumps(good).encode(),)),
        *(json.dumps({"x": {**good, **change}}).encode() for change in (
            {"data_offsets": [0, 8]}, {"data_offsets": [4, 0]}, {"data_offsets": [-4, 0]}, {"data_offsets": [0, 2**63]},
            {"shape": [2**62, 4]}, {"shape": [-1]}, {"shape": [0.5]}, {"dtype": "F33"},
        )),
    ):  # fmt: skip
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        refused(tmp_path / "x")
    for length in (0, 2**31, 2**60, 2**64 - 1):  # nobody reserves so much memory for a header
        (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b'{"x": ')
        assert "cannot read the checkpoint" in refused(tmp_path / "x")


def test_tensors_that_are_no_weights_are_refused(tmp_path):
    for wrong in (
        lambda weight: weight.to(torch.int32), lambda weight: weight.to(torch.complex64),
        lambda weight: weight.to_sparse(), lambda weight: weight.to("meta"),
    ):  # fmt: skip
        state = tiny_densenet().state_dict()
        state["stages.1.layers.0.conv1.weight"] = wrong(state["stages.1.layers.0.conv1.weight"])
        torch.save(state, tmp_path / "x.pth")
        assert "1 of another type (stages.1.layers.0.conv1.weight " in refused(tmp_path / "x.pth")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    half["stages.1.layers.0.conv1.weight"] = tiny_densenet().state_dict()["stages.1.layers.0.conv1.weight"].double()
    torch.save(half, tmp_path / "half.pth")
    load_checkpoint(tiny_densenet(), tmp_path / "half.pth")
    # The authors' heads, of which one has another shape, or none.
    name = "features.denseblock_1.denselayer_1.conv_1.headconv_{}.conv.weight"
    for state in (
        {name.format(0): torch.ones(2, 3, 1, 1), name.format(1): torch.ones(2, 4, 1, 1)},
        {name.format(0): torch.tensor(1.0)},
        {"a._inactive_channels": torch.ones(3)},
    ):
        torch.save({"state_dict": state}, tmp_path / "x.pth")
        assert "does not fit DGCDenseNet" in refused(tmp_path / "x.pth")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickled_code_is_not_run(write, tmp_path):
    write({"state_dict": Attack(tmp_path / "was_run")}, tmp_path / "attack.pth.tar")
    refused(tmp_path / "attack.pth.tar")
    assert not (tmp_path / "was_run").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_checkpoint(tiny_densenet(), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space"):
        save_checkpoint(tiny_densenet(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_an_interrupt_just_after_the_rename_is_an_interrupt(tmp_path, monkeypatch):
    rename = os.replace

    def interrupted(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", "whole")
    assert (tmp_path / "x").read_text() == "whole" and os.listdir(tmp_path) == ["x"]
