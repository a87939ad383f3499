"""Data: the formats on disk, written here, and the loaders."""

import io
import logging
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.data import image_files
from dgc_fastai.data.classes import class_names
from dgc_fastai.data.image_files import open_image, read_image
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.recipe.machine import check_data
from dgc_fastai.recipe.schema import Data
from dgc_fastai.utils.errors import RecipeError
from helpers import QUICKSTART
from helpers.datasets import write_cifar, write_fashion_mnist, write_imagenet

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
    # PyTorch and Pillow round otherwise: by two grey levels of 255 at most, and by next to nothing in the mean.
    torch.testing.assert_close(x[0].as_subclass(torch.Tensor), expected, rtol=0, atol=2.01 / 255 / 0.224)
    assert (x[0] - expected).abs().mean() < 0.05 / 255 / 0.224
    (first, _), (second, _) = dls.train.one_batch(), dls.train.one_batch()
    assert first.shape == (5, 3, 32, 32) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "cifar100", "imagenet", "folder"])
def test_batches_can_be_shown(tmp_path, name):
    import matplotlib

    matplotlib.use("Agg")
    if name.startswith("cifar"):
        write_cifar(tmp_path, name)
    elif name == "fashion_mnist":
        write_fashion_mnist(tmp_path)
    elif name != "digits":
        write_imagenet(tmp_path)
    path = None if name == "digits" else str(tmp_path)
    where = "data.path=null" if path is None else f"data.path={path}"
    small = "data.size=32", "data.batch_size=6", "model.stages=[1,1,1]"
    recipe = load_recipe(QUICKSTART, [f"data.name={name}", where, *small])
    learn = build_learner(recipe)
    learn.dls.show_batch(max_n=4)
    titles = [axes.get_title() for axes in matplotlib.pyplot.gcf().axes]
    assert len(titles) == 4 and set(titles) <= set(learn.dls.vocab)
    matplotlib.pyplot.close("all")
    with learn.no_bar():
        learn.show_results(max_n=4)
    titles = [axes.get_title() for axes in matplotlib.pyplot.gcf().axes]
    assert len(titles) == 4 and all(set(title.split("\n")) <= set(learn.dls.vocab) for title in titles)
    matplotlib.pyplot.close("all")
    # And a learner can be taken elsewhere, as every learner of fastai.
    learn.export(tmp_path / "learner.pkl")
    from fastai.learner import load_learner

    assert list(load_learner(tmp_path / "learner.pkl").dls.vocab) == list(learn.dls.vocab)


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


def test_a_class_without_images_is_named(tmp_path):
    write_imagenet(tmp_path)
    for file in (tmp_path / "val/n02").iterdir():
        file.unlink()
    with pytest.raises(RecipeError, match="n02"):
        build_dataloaders(Data(name="imagenet", path=str(tmp_path)), CPU)


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


# A folder of one's own --------------------------------------------------------------------------------------


def folder_data(path, **kwargs):
    return Data(name="folder", path=str(path), **{"size": 16, "batch_size": 4, **kwargs})


@pytest.mark.parametrize("valid", ["val", "valid", "validation", "test"])
def test_a_folder_with_validation_images(tmp_path, valid):
    write_imagenet(tmp_path, classes=("cat", "dog"))
    (tmp_path / "val").rename(tmp_path / valid)
    dls = build_dataloaders(folder_data(tmp_path), CPU)
    assert class_names(folder_data(tmp_path)) == ["cat", "dog"]
    assert (len(dls.train_ds), len(dls.valid_ds)) == (8, 4)
    x, y = dls.valid.one_batch()
    assert x.shape == (4, 3, 16, 16) and y.tolist() == [0, 0, 1, 1]
    with pytest.raises(RecipeError, match="leave valid_share out"):
        check_data(folder_data(tmp_path, valid_share=0.5))


def test_a_folder_without_holds_out_the_same_share_of_each_class(tmp_path):
    write_imagenet(tmp_path, classes=("cat", "dog"), train=10, valid=1)
    pictures = tmp_path / "train"
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        dls = build_dataloaders(folder_data(pictures, valid_share=0.3), CPU)
        splits.append((list(dls.train_ds.items), list(dls.valid_ds.items)))
    assert splits[0] == splits[1] and not set(splits[0][0]) & set(splits[0][1])
    assert [path.parent.name for path in splits[0][1]].count("cat") == 3 == len(splits[0][1]) / 2
    assert len(build_dataloaders(folder_data(pictures), CPU).valid_ds) == 4  # a fifth by default
    with pytest.raises(RecipeError, match="data.valid_share: cannot hold out"):
        build_dataloaders(folder_data(pictures, valid_share=0.01), CPU)


def damage(path):
    path.write_bytes(path.read_bytes()[:200])
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named_and_stop_the_run(tmp_path, workers):
    write_imagenet(tmp_path)
    bad = damage(tmp_path / "train/n02/n02_1.JPEG")
    dls = build_dataloaders(folder_data(tmp_path, workers=workers), CPU)
    with pytest.raises(RecipeError) as error:
        list(dls.train)
    assert str(bad) in str(error.value) and "data.unreadable=skip" in str(error.value)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named_once_and_skipped(tmp_path, workers, caplog):
    write_imagenet(tmp_path)
    bad = [
        damage(tmp_path / "train/n01/n01_0.JPEG"),
        tmp_path / "val/n01/n01_1.JPEG",
        tmp_path / "train/n03/n03_2.JPEG",
    ]
    bad[1].write_text("no image")
    bad[2].write_bytes(b"")
    dls = build_dataloaders(folder_data(tmp_path, workers=workers, unreadable="skip"), CPU)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert sum(len(x) for x, _ in dls.train) == 10 and sum(len(x) for x, _ in dls.valid) == 5
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and all(
        any(f"skipped the unreadable image {path}: " in line for line in told) for path in bad
    )
    x, y = dls.train.one_batch()
    assert len(x) == len(y)
    import matplotlib

    matplotlib.use("Agg")
    dls.train.show_batch(max_n=2)  # asks for the first item, which is unreadable
    matplotlib.pyplot.close("all")


# Every way in which a file can be bad, and files that only look odd ------------------------------------------


def encoded(kind, mode="RGB", **options):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).convert(mode)
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def png(width, height, pixels=b"", depth=8, color=2):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def cut(content, share):
    return content[: int(len(content) * share)]


def zeroed(content, start, stop):
    start, stop = (int(len(content) * share) for share in (start, stop))
    return content[:start] + bytes(stop - start) + content[stop:]


def huge(content):
    """A JPEG whose head claims 65,000 x 65,000 pixels."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", 65000, 65000) + content[place + 4 :]


def corrupt_files():
    jpeg, progressive, crc = encoded("JPEG"), encoded("JPEG", progressive=True), bytearray(encoded("PNG"))
    crc[60] ^= 255
    return {
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "magic_only.jpg": jpeg[:3],
        "head_only.jpg": jpeg[: jpeg.index(b"\xff\xda")],
        "cut_early.jpg": cut(jpeg, 0.1),
        "cut_half.jpg": cut(jpeg, 0.5),
        "cut_late.jpg": cut(jpeg, 0.95),
        "last_byte_gone.jpg": jpeg[:-1],
        "progressive_cut.jpg": cut(progressive, 0.7),
        "head_zeroed.jpg": zeroed(jpeg, 0, 0.1),
        "wrong_magic.jpg": b"XY" + jpeg[2:],
        "huge.jpg": huge(jpeg),
        "text.jpg": b"no image at all",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "zeros.jpg": bytes(5000),
        "crc.png": bytes(crc),
        "cut.png": cut(encoded("PNG"), 0.5),
        "middle_zeroed.png": zeroed(encoded("PNG"), 0.4, 0.6),
        "no_pixels.png": png(10, 10),
        "zero_by_zero.png": png(0, 0),
        "bomb.png": png(60000, 60000),
        "cut_gif.jpg": cut(encoded("GIF", "P"), 0.5),
        "cut.webp": cut(encoded("WEBP"), 0.5),
        "cut.bmp": cut(encoded("BMP"), 0.5),
        "cut.tiff": cut(encoded("TIFF"), 0.5),
        "cut.ppm": cut(encoded("PPM"), 0.5),
    }


def odd_files():
    """Files that are not damaged, if rarely seen."""
    noise = np.random.default_rng(1).integers(0, 2**16, (60, 80))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise)
    return {
        "cmyk.jpg": encoded("JPEG", "CMYK"),
        "grey.jpg": encoded("JPEG", "L"),
        "progressive.jpg": encoded("JPEG", progressive=True),
        "a_png.jpg": encoded("PNG"),
        "palette.png": encoded("PNG", "P"),
        "transparent_palette.png": encoded("PNG", "P", transparency=0),
        "grey_alpha.png": encoded("PNG", "LA"),
        "alpha.png": encoded("PNG", "RGBA"),
        "two_colours.png": encoded("PNG", "1"),
        "deep.png": png(80, 60, rows, depth=16, color=0),
        "one_pixel.png": png(1, 1, b"\0\1\2\3"),
        "a_gif.jpg": encoded("GIF", "P"),
        "plain.webp": encoded("WEBP"),
        "plain.bmp": encoded("BMP"),
        "plain.tiff": encoded("TIFF"),
        "plain.ppm": encoded("PPM"),
    }


def write_odd_and_corrupt(folder):
    """Both as training images of ImageNet's layout, with a link to nowhere; the paths of those that are bad."""
    write_imagenet(folder, train=2)
    for name, content in (odd_files() | corrupt_files()).items():
        (folder / "train/n01" / name).write_bytes(content)
    (folder / "train/n02/nowhere.jpg").symlink_to(folder / "gone.jpg")
    (folder / "train/n03/folder.jpg").mkdir()  # not listed, since no file
    return [folder / "train/n01" / name for name in corrupt_files()] + [folder / "train/n02/nowhere.jpg"]


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resizing", [(), ("cpu",)], ids=["by workers", "by device"])
def test_of_many_kinds_of_corrupt_images_each_is_named_and_no_other_lost(
    tmp_path, workers, resizing, caplog, capfd, monkeypatch
):
    monkeypatch.setattr(image_files, "RESIZING_DEVICES", resizing)
    bad = write_odd_and_corrupt(tmp_path)
    assert len(bad) >= 20
    dl = build_dataloaders(folder_data(tmp_path, workers=workers, unreadable="skip", batch_size=50), CPU).train
    with caplog.at_level(logging.WARNING):
        images, labels = map(torch.cat, zip(*dl))
        list(dl)
    assert len(images) == len(labels) == 6 + len(odd_files()) and images.isfinite().all()
    told = [record.getMessage() for record in caplog.records if record.name == "dgc_fastai.data.image_files"]
    assert sorted(line.split(": ")[0] for line in told) == sorted(
        f"skipped the unreadable image {path}" for path in bad
    )
    assert all("\n" not in line and len(line) - len(str(tmp_path)) < 250 for line in told)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_each_kind_of_corrupt_image_stops_the_run_with_one_line(tmp_path):
    write_imagenet(tmp_path, classes=("cat", "dog"), train=1)
    kinds = corrupt_files()
    for number, (name, content) in enumerate(kinds.items()):
        path = tmp_path / "train/cat" / name
        path.write_bytes(content)
        workers = 2 if number % 13 == 0 else 0
        with pytest.raises(RecipeError) as error:
            list(build_dataloaders(folder_data(tmp_path, workers=workers), CPU).train)
        line = str(error.value)
        assert line.startswith(f"data.path: cannot read the image {path}: ") and "\n" not in line
        assert line.count(str(path)) == 1 and line.endswith("mend or remove it, or set data.unreadable=skip")
        path.unlink()
    assert sum(len(x) for x, _ in build_dataloaders(folder_data(tmp_path), CPU).train) == 2


def test_odd_images_are_seen_as_they_are(tmp_path):
    expected = np.asarray(Image.open(io.BytesIO(encoded("PNG"))).convert("L"), float)
    for name, content in odd_files().items():
        (path := tmp_path / name).write_bytes(content)
        image = open_image(path)
        assert image.mode == "RGB" and type(image).__name__ == "PILImage", name
        if name == "deep.png":
            with Image.open(path) as deep:
                expected_deep = np.asarray(deep).astype(int) // 256
            assert (np.asarray(image)[..., 0] == expected_deep).all() and 100 < expected_deep.mean() < 155
        elif name not in ("one_pixel.png", "two_colours.png"):
            grey = np.asarray(image.convert("L"), float)
            assert np.corrcoef(grey.ravel(), expected.ravel())[0, 1] > 0.6, name


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_an_image_of_somebody_else_s_is_named(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "train/n01/n01_0.JPEG").chmod(0)
    with pytest.raises(RecipeError, match="n01_0.JPEG: Permission denied; mend"):
        list(build_dataloaders(folder_data(tmp_path), CPU).train)


@pytest.mark.parametrize("unreadable", ["stop", "skip"])
@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_in_the_middle_of_an_epoch_stop_the_run(tmp_path, workers, unreadable):
    write_imagenet(tmp_path, train=40)
    dl = build_dataloaders(folder_data(tmp_path, workers=workers, unreadable=unreadable), CPU).train
    with pytest.raises(RecipeError, match=r"^data.path: cannot read the image \S+: No such file or directory; mend"):
        for number, _ in enumerate(dl):
            if number == 0:
                shutil.rmtree(tmp_path / "train")
    assert number < 15


def test_a_batch_without_one_readable_image_stops_the_run_all_the_same(tmp_path):
    write_imagenet(tmp_path, classes=("cat", "dog"), train=2)
    for path in tmp_path.glob("train/*/*"):
        path.write_bytes(b"")
    dls = build_dataloaders(folder_data(tmp_path, unreadable="skip"), CPU)
    with pytest.raises(RecipeError, match="cannot read the image .*; mend or remove it$"):
        list(dls.train)


# An epoch again ---------------------------------------------------------------------------------------------


def test_an_epoch_can_be_entered_at_any_batch(tmp_path):
    write_imagenet(tmp_path)
    for data in (folder_data(tmp_path, augment=["crop_flip", "rand_augment"]), Data(name="digits", batch_size=300)):
        dl = build_dataloaders(data, CPU).train
        dl.set_epoch(seed=3, epoch=5)
        labels = [y.tolist() for _, y in dl]
        dl.set_epoch(seed=3, epoch=5, skip=1)
        assert [y.tolist() for _, y in dl] == labels[1:]
        assert len(dl) == len(labels)
        dl.set_epoch(seed=3, epoch=5, skip=len(labels))
        assert list(dl) == []
        for other in (dict(seed=3, epoch=6), dict(seed=4, epoch=5)):
            dl.set_epoch(**other)
            assert [y.tolist() for _, y in dl] != labels


def test_image_files_are_augmented_alike_whatever_the_workers_and_the_place_of_entry(tmp_path):
    write_imagenet(tmp_path)
    epochs = []
    for workers, skip in ((0, 0), (1, 0), (2, 1)):
        dl = build_dataloaders(
            folder_data(tmp_path, workers=workers, augment=["crop_flip", "trivial_augment"]), CPU
        ).train
        torch.manual_seed(workers)  # nor does it matter what was drawn before
        dl.set_epoch(seed=0, epoch=1, skip=skip)
        before = torch.get_rng_state()
        epochs.append([x for x, _ in dl])
        assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(epochs[0], epochs[1]):
        assert torch.equal(first, second)
    assert torch.equal(epochs[2][0], epochs[0][1])


def test_each_image_file_is_augmented_its_own_way_and_each_epoch_another(tmp_path):
    write_imagenet(tmp_path, train=1)
    for path in tmp_path.glob("train/*/*"):  # one picture under six names
        path.write_bytes((tmp_path / "train/n01/n01_0.JPEG").read_bytes())
        path.with_stem("copy").write_bytes(path.read_bytes())
    dl = build_dataloaders(folder_data(tmp_path, batch_size=6), CPU).train
    pictures = []
    for epoch in (0, 1):
        dl.set_epoch(seed=0, epoch=epoch)
        pictures += [picture for x, _ in dl for picture in x]
    assert len(pictures) == 12
    assert not any(torch.equal(one, other) for n, one in enumerate(pictures) for other in pictures[:n])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_device_that_resizes_sees_what_workers_would_have_resized(tmp_path, workers, monkeypatch):
    write_imagenet(tmp_path, train=6)
    data = folder_data(tmp_path, size=36, batch_size=10, workers=workers)
    batches = []
    for resizing in ((), ("cpu",)):
        monkeypatch.setattr(image_files, "RESIZING_DEVICES", resizing)
        dl = build_dataloaders(data, CPU).train
        dl.set_epoch(seed=0, epoch=0)
        batches.append(list(dl))
        shapes = {tuple(dl.do_item(number)[0].shape) for number in range(18)}
        assert (shapes == {(3, 36, 36)}) == (not resizing)
    assert all(max(shape) <= 72 for shape in shapes)  # larger ones are resized by the worker, for fewer bytes
    assert [len(x) for x, _ in batches[1]] == [10, 8]
    for (one, labels), (other, same) in zip(*batches):
        assert labels.tolist() == same.tolist() and type(other) is type(one) and type(same) is type(labels)
        difference = (one - other).abs() * 0.2251 * 255  # in grey levels; floats are rounded once, bytes twice
        assert difference.max() < 1.01 and difference.mean() < 0.25


@pytest.mark.parametrize("augment", [[], ["crop_flip", "rand_augment"], ["crop_flip", "random_erasing"]])
def test_a_device_that_resizes_can_be_shown_and_spares_what_it_is_not_for(tmp_path, augment, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.setattr(image_files, "RESIZING_DEVICES", ("cpu",))
    write_imagenet(tmp_path)
    dls = build_dataloaders(folder_data(tmp_path, size=32, augment=augment), CPU)
    assert dls.train.one_batch()[0].shape == dls.valid.one_batch()[0].shape == (4, 3, 32, 32)
    shapes = {tuple(dls.train.do_item(number)[0].shape) for number in range(12)}
    assert (shapes == {(3, 32, 32)}) == ("random_erasing" not in augment)
    for dl in (dls.train, dls.valid):
        dl.show_batch(max_n=2)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "folder"])
def test_an_image_file_is_seen_as_in_validation(tmp_path, name):
    path = {"path": None if name == "digits" else str(tmp_path / "data")}
    if name == "folder":
        write_imagenet(tmp_path / "data")
        data = Data(name=name, **path, size=32)
        dls = build_dataloaders(data, CPU)
        file = dls.valid_ds.items[0]
    else:
        if name == "cifar10":
            write_cifar(tmp_path / "data", name)
        elif name == "fashion_mnist":
            write_fashion_mnist(tmp_path / "data")
        data = Data(name=name, **path)
        dls = build_dataloaders(data, CPU)
        file = tmp_path / "0.png"
        image = dls.valid_ds.images[0]
        Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()).save(file)
    expected = dls.valid.one_batch()[0][0]
    torch.testing.assert_close(read_image(file, data), expected.as_subclass(torch.Tensor))
