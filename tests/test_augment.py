"""Augmentation: each transform against a second way to compute it."""

import pytest
import torch
from fastai.torch_core import TensorImage
from torchvision.transforms import v2

from dgc_fastai.augment import Automatic, RandomCropFlip, RandomErasing, batch_augmentation, training_transform
from dgc_fastai.recipe import Data


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


def test_random_erasing_sets_one_rectangle_of_a_quarter_of_the_images():
    x = TensorImage(torch.rand(4000, 3, 20, 30) + 1)
    y = RandomErasing().encodes(x)
    erased = (y == 0).all(1)
    assert torch.equal((y == 0).any(1), erased) and torch.equal(y[:, 0][~erased], x[:, 0][~erased])
    rows, columns = erased.any(2), erased.any(1)
    assert torch.equal(rows.unsqueeze(2) & columns.unsqueeze(1), erased)  # a rectangle is its sides' product
    heights, widths = rows.sum(1), columns.sum(1)
    some = heights > 0
    assert abs(some.float().mean() - 0.25) < 0.03
    assert (rows.int().diff().abs().sum(1) <= 2).all() and (columns.int().diff().abs().sum(1) <= 2).all()  # no holes
    area, sides = (heights * widths)[some] / 600, (heights / widths)[some]
    assert area.max() <= 0.36 and area.min() >= 0.01 and 0.12 < area.mean() < 0.2
    assert 0.7 < sides.log().exp().median() < 1.4 and sides.max() < 5 and sides.min() > 0.15
    for places in (rows[some].float().mean(0), columns[some].float().mean(0)):
        assert places.min() > 0.03 and (places - places.flip(0)).abs().max() < 0.1  # anywhere, and no side preferred


@pytest.mark.parametrize(
    "name, function", [("rand_augment", v2.RandAugment), ("trivial_augment", v2.TrivialAugmentWide)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_automatic_augmentation_is_torchvision_s_part_by_part(name, function, channels):
    data = Data(name="cifar10", path=".", augment=[name])
    (transform,) = batch_augmentation(data)
    assert isinstance(transform, Automatic) and isinstance(transform.function, function)
    x = TensorImage(torch.randint(0, 256, (40, channels, 16, 16), dtype=torch.uint8))
    torch.manual_seed(5)
    y = transform.encodes(x)
    torch.manual_seed(5)
    expected = torch.cat([function()(part) for part in x.as_subclass(torch.Tensor).chunk(16)])
    assert y.dtype == torch.uint8 and torch.equal(y.as_subclass(torch.Tensor), expected) and not torch.equal(y, x)
    assert len(transform.encodes(x[:3])) == 3


def test_names_choose_what_is_done_and_validation_is_spared():
    names = {"crop_flip": RandomCropFlip, "trivial_augment": Automatic, "random_erasing": RandomErasing}
    assert batch_augmentation(Data(name="digits", augment=[])) == []
    for name, kind in names.items():
        (transform,) = batch_augmentation(Data(name="digits", augment=[name]))
        assert type(transform) is kind and transform.split_idx == 0
    assert [t.flip for t in batch_augmentation(Data(name="digits"))] == [False]
    assert [t.flip for t in batch_augmentation(Data(name="fashion_mnist"))] == [True]
    assert [t.padding for t in batch_augmentation(Data(name="cifar10", path="."))] == [4]


def test_files_are_cropped_flipped_and_augmented_by_name():
    def kinds(*names):
        steps = training_transform(Data(name="folder", path=".", size=32, augment=list(names))).transforms
        return [type(step).__name__ for step in steps]

    assert kinds("crop_flip") == ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert kinds("crop_flip", "rand_augment")[-1] == "RandAugment"
    assert kinds("trivial_augment") == ["Compose", "TrivialAugmentWide"]  # the validation's, then that
    assert kinds() == ["Compose"]
