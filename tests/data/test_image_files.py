"""Folders of image files: layouts, splits, unreadable files, resizing on the device."""

import logging
import os
import shutil

import pytest
import torch
from PIL import Image

from dgc_fastai.data import image_files
from dgc_fastai.data.classes import class_names
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.recipe.machine import check_data
from dgc_fastai.recipe.schema import Data
from dgc_fastai.utils.errors import RecipeError
from helpers.datasets import folder_data, write_imagenet

CPU = torch.device("cpu")


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


def test_a_class_without_images_is_named(tmp_path):
    write_imagenet(tmp_path)
    for file in (tmp_path / "val/n02").iterdir():
        file.unlink()
    with pytest.raises(RecipeError, match="n02"):
        build_dataloaders(Data(name="imagenet", path=str(tmp_path)), CPU)


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


@pytest.mark.parametrize("workers", [0, 1], ids="workers={}".format)
def test_unreadable_images_are_named_and_stop_the_run(tmp_path, workers):
    write_imagenet(tmp_path)
    bad = damage(tmp_path / "train/n02/n02_1.JPEG")
    dls = build_dataloaders(folder_data(tmp_path, workers=workers), CPU)
    with pytest.raises(RecipeError) as error:
        list(dls.train)
    assert str(bad) in str(error.value) and "data.unreadable=skip" in str(error.value)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1], ids="workers={}".format)
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_an_image_of_somebody_else_s_is_named(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "train/n01/n01_0.JPEG").chmod(0)
    with pytest.raises(RecipeError, match="n01_0.JPEG: Permission denied; mend"):
        list(build_dataloaders(folder_data(tmp_path), CPU).train)


@pytest.mark.parametrize("unreadable", ["stop", "skip"])
@pytest.mark.parametrize("workers", [0, 1], ids="workers={}".format)
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


@pytest.mark.parametrize("workers", [0, 2], ids="workers={}".format)
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


@pytest.mark.parametrize(
    "augment", [[], ["crop_flip", "rand_augment"], ["crop_flip", "random_erasing"]], ids=["none", "rand", "erasing"]
)
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
