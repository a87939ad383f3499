"""Data: the augmentation, and the on-disk formats, written here."""

import pickle

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage
from PIL import Image

from dgc_fastai.augment import RandomCropFlip
from dgc_fastai.data import build_dataloaders, class_names, input_size
from dgc_fastai.errors import RecipeError
from dgc_fastai.recipe import Data

CPU = torch.device("cpu")


def write_cifar(folder, name, binary=False, n=40):
    """CIFAR's layout with random images: image i is mostly of value i, so that it can be told."""
    rng = np.random.default_rng(0)
    fine = 100 if name == "cifar100" else 10

    def part(count):
        images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return images, rng.integers(0, fine, count)

    folder = (
        folder
        / {
            ("cifar10", False): "cifar-10-batches-py",
            ("cifar10", True): "cifar-10-batches-bin",
            ("cifar100", False): "cifar-100-python",
            ("cifar100", True): "cifar-100-binary",
        }[name, binary]
    )
    folder.mkdir(parents=True)
    names = [f"class{i}" for i in range(fine)]
    trains = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    test = "test_batch" if name == "cifar10" else "test"
    key, meta = ("labels", "batches.meta") if name == "cifar10" else ("fine_labels", "meta")
    content = {}
    for file in [*trains, test]:
        images, labels = content[file] = part(n if file == test else n // len(trains))
        if binary:
            coarse = [] if name == "cifar10" else [np.zeros((len(labels), 1), np.uint8)]
            rows = np.concatenate([*coarse, labels[:, None].astype(np.uint8), images], 1)
            (folder / f"{file}.bin").write_bytes(rows.tobytes())
        else:
            batch = {"data": images, key: labels.tolist(), "filenames": ["x.png"] * len(labels)}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    if binary:
        meta = "batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"
        (folder / meta).write_text("\n".join(names) + "\n\n")
    else:
        label_names = {"label_names" if name == "cifar10" else "fine_label_names": names}
        (folder / meta).write_bytes(pickle.dumps(label_names, protocol=2))
    return folder, content, test


def write_imagenet(folder, classes=("n01", "n02", "n03"), train=4, valid=2):
    """ImageNet's layout with small JPEGs; a class is a colour."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", valid)):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (60 + i, 80, 3), dtype=np.uint8)
                pixels[..., number % 3] += 150
                Image.fromarray(pixels).save(folder / part / name / f"{name}_{i}.JPEG")
    return folder


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


def test_random_crop_and_flip_against_slicing():
    crop = RandomCropFlip(padding=4, flip=True)
    x = TensorImage(torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8))
    y = crop.encodes(x)
    padded = torch.nn.functional.pad(x.as_subclass(torch.Tensor), [4] * 4)
    found = []
    for image, result in zip(padded, y):
        windows = {
            (row, column, flipped): image[:, row : row + 8, column : column + 8].flip(2) if flipped
            else image[:, row : row + 8, column : column + 8]
            for row in range(9) for column in range(9) for flipped in (False, True)
        }  # fmt: skip
        found.append(next(place for place, window in windows.items() if torch.equal(window, result)))
    rows, columns, flips = zip(*found)
    assert len(set(rows)) == len(set(columns)) == 9 and 15 < sum(flips) < 49
    assert y.dtype == torch.uint8 and type(y) is TensorImage
    still = RandomCropFlip(padding=0, flip=False)
    assert torch.equal(still.encodes(x), x)


def test_digits_are_real_and_held_out():
    data = Data(name="digits", size=16)
    dls = build_dataloaders(data, CPU)
    assert (len(dls.train_ds), len(dls.valid_ds), input_size(data)) == (1437, 360, (1, 16, 16))
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


def test_imagenet_s_layout(tmp_path):
    write_imagenet(tmp_path)
    data = Data(name="imagenet", path=str(tmp_path), size=32, batch_size=5)
    dls = build_dataloaders(data, CPU)
    assert class_names(data) == ["n01", "n02", "n03"] and list(dls.vocab) == class_names(data)
    assert [len(x) for x, _ in dls.train] == [5, 5, 2] and sum(len(x) for x, _ in dls.valid) == 6
    x, y = next(iter(dls.valid))
    assert x.shape == (5, 3, 32, 32)
    assert x.mean((2, 3)).argmax(1).tolist() == y.tolist() == [0, 0, 1, 1, 2]  # the colour is the class
    # Validation is torchvision's: the shorter side to 256 / 224 of the size, then the centre.
    from torchvision.transforms import v2

    image = Image.open(tmp_path / "val/n01/n01_0.JPEG")
    steps = [v2.Resize(37), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    expected = v2.Compose([*steps, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(image)
    torch.testing.assert_close(x[0].as_subclass(torch.Tensor), expected)
    (first, _), (second, _) = dls.train.one_batch(), dls.train.one_batch()
    assert first.shape == (5, 3, 32, 32) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenet"])
def test_batches_can_be_shown(tmp_path, name):
    import matplotlib

    matplotlib.use("Agg")
    if name == "cifar10":
        write_cifar(tmp_path, name)
    elif name == "imagenet":
        write_imagenet(tmp_path)
    path = None if name == "digits" else str(tmp_path)
    dls = build_dataloaders(Data(name=name, path=path, size=32, batch_size=6), CPU)
    dls.show_batch(max_n=4)
    titles = [axes.get_title() for axes in matplotlib.pyplot.gcf().axes]
    assert len(titles) == 4 and set(titles) <= set(dls.vocab)
    matplotlib.pyplot.close("all")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_damaged_or_hostile_files_are_named(tmp_path):
    folder, content, test = write_cifar(tmp_path, "cifar10")
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
    assert "is no array" in refusal() and not (tmp_path / "was_run").exists()
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


def test_a_class_without_images_is_named(tmp_path):
    write_imagenet(tmp_path)
    for file in (tmp_path / "val/n02").iterdir():
        file.unlink()
    with pytest.raises(RecipeError, match="n02"):
        build_dataloaders(Data(name="imagenet", path=str(tmp_path)), CPU)
