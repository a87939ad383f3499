"""Sets held in memory: the formats on disk, written here, and their loaders."""

import pickle

import numpy as np
import pytest
import torch

from dgc_fastai.data.classes import class_names
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.recipe.schema import Data
from dgc_fastai.utils.errors import RecipeError
from helpers.datasets import write_cifar, write_fashion_mnist

CPU = torch.device("cpu")


@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("inside", [False, True], ids=["above", "inside"])
def test_cifar_s_formats(tmp_path, name, binary, inside):
    folder, content, test = write_cifar(tmp_path, name, binary)
    data = Data(name=name, path=str(folder if inside else tmp_path), batch_size=16)
    dls = build_dataloaders(data, CPU)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (40, 40)
    assert len(class_names(data)) == (10 if name == "cifar10" else 100) and class_names(data)[3] == "class3"
    images, labels = content[test]
    x = torch.cat([x for x, _ in dls.valid])
    mean, std = {
        "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    }[name]
    expected = torch.from_numpy(images).view(-1, 3, 32, 32) / 255
    expected = (expected - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(x.as_subclass(torch.Tensor), expected)
    assert torch.cat([y for _, y in dls.valid]).tolist() == labels.tolist()
    assert [len(y) for _, y in dls.train] == [16, 16, 8]  # the last, smaller batch is kept


def test_every_training_image_comes_once_an_epoch_and_in_another_order(tmp_path):
    write_cifar(tmp_path, "cifar10")
    dls = build_dataloaders(Data(name="cifar10", path=str(tmp_path), batch_size=40), CPU)
    ((_, first),), ((_, second),) = list(dls.train), list(dls.train)
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(dls.train_ds.labels.tolist())
    assert first.tolist() != second.tolist()


def test_digits_are_real_and_held_out():
    data = Data(name="digits", size=16)
    dls = build_dataloaders(data, CPU)
    assert (len(dls.train_ds), len(dls.valid_ds), data.input_size) == (1437, 360, (1, 16, 16))
    assert dls.one_batch()[0].shape == (64, 1, 16, 16)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    plain = build_dataloaders(Data(name="digits", size=8), CPU)
    rows = {
        (tuple(image.flatten().tolist()), int(label))
        for split in (plain.train_ds, plain.valid_ds) for image, label in zip(split.images, split.labels)
    }  # fmt: skip
    assert rows == {
        (tuple(np.rint(image * 255 / 16).astype(int).tolist()), int(label)) for image, label in zip(images, labels)
    }
    assert torch.bincount(dls.valid_ds.labels).min() >= 34
    x = torch.cat([x for x, _ in plain.valid])
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    again = build_dataloaders(data, CPU)
    assert torch.equal(again.valid_ds.labels, dls.valid_ds.labels)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_damaged_or_hostile_files_are_named(tmp_path):
    folder, content, _test = write_cifar(tmp_path, "cifar10")
    data = Data(name="cifar10", path=str(tmp_path))

    def refusal():
        with pytest.raises(RecipeError) as error:
            build_dataloaders(data, CPU)
        assert "\n" not in str(error.value)
        return str(error.value)

    file = folder / "data_batch_3"
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-5], b"hello", pickle.dumps([1]), pickle.dumps({"data": 3})):
        file.write_bytes(damaged)
        assert str(file) in refusal()
    file.write_bytes(pickle.dumps(Attack(tmp_path / "was_run")))
    assert "is not an array" in refusal() and not (tmp_path / "was_run").exists()
    file.unlink()
    assert "No such file" in refusal()
    images, labels = content["data_batch_3"]
    file.write_bytes(pickle.dumps({"data": images, "labels": [10] * len(labels)}))
    assert "labels outside 0 to 9" in refusal()
    file.write_bytes(pickle.dumps({"data": images, "labels": [1]}))
    assert str(file) in refusal()


def test_damaged_binary_files_are_named(tmp_path):
    folder, *_ = write_cifar(tmp_path, "cifar100", binary=True)
    file = folder / "test.bin"
    for damaged in (b"", file.read_bytes()[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(RecipeError, match="test.bin is damaged"):
            build_dataloaders(Data(name="cifar100", path=str(tmp_path)), CPU)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"], ids=["debian", "torchvision"])
def test_fashion_mnist_s_files(tmp_path, packed, below):
    content = write_fashion_mnist(tmp_path / below, packed)
    data = Data(name="fashion_mnist", path=str(tmp_path), batch_size=20)
    dls = build_dataloaders(data, CPU)
    assert data.input_size == (1, 28, 28) and class_names(data)[9] == "Ankle boot"
    images, labels = content["t10k"]
    x, y = map(torch.cat, zip(*dls.valid))
    expected = (torch.from_numpy(images).unsqueeze(1) / 255 - 0.2860) / 0.3530
    torch.testing.assert_close(x.as_subclass(torch.Tensor), expected)
    assert y.tolist() == labels.tolist()
    assert sorted(dls.train_ds.labels.tolist()) == sorted(content["train"][1].tolist())


def test_torchvision_reads_the_same_of_fashion_mnist(tmp_path):
    from torchvision.datasets import FashionMNIST

    write_fashion_mnist(tmp_path / "FashionMNIST/raw")
    theirs = FashionMNIST(tmp_path, train=False)
    ours = build_dataloaders(Data(name="fashion_mnist", path=str(tmp_path)), CPU).valid_ds
    assert torch.equal(ours.images[:, 0], theirs.data) and torch.equal(ours.labels, theirs.targets)
    assert class_names(Data(name="fashion_mnist", path=str(tmp_path))) == FashionMNIST.classes


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_damaged_idx_files_are_named(tmp_path, packed):
    write_fashion_mnist(tmp_path, packed)
    file = tmp_path / ("t10k-images-idx3-ubyte" + (".gz" if packed else ""))
    whole = file.read_bytes()
    for damaged in (b"", whole[:3], whole[:10], whole[:-1], b"hello" + whole, whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(RecipeError, match="t10k-images-idx3-ubyte.* is damaged"):
            build_dataloaders(Data(name="fashion_mnist", path=str(tmp_path)), CPU)
    file.unlink()
    with pytest.raises(RecipeError, match="dataset-fashion-mnist"):
        build_dataloaders(Data(name="fashion_mnist", path=str(tmp_path)), CPU)


def test_a_small_set_lives_on_the_device_and_must_fit(tmp_path):
    write_fashion_mnist(tmp_path)
    dls = build_dataloaders(Data(name="fashion_mnist", path=str(tmp_path)), torch.device("meta"))
    assert dls.train_ds.images.device.type == dls.valid_ds.labels.device.type == "meta"
    with pytest.raises(RecipeError, match="data.size: digits at 4096 px needs 28 GiB"):
        build_dataloaders(Data(name="digits", size=4096), CPU)
