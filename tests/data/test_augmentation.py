"""Augmentation: each transform against a second way to compute it."""

import pytest
import torch
from fastai.torch_core import TensorImage
from torchvision.transforms import v2

from dgc_fastai.data.augmentation import (
    Automatic,
    FileCropFlip,
    RandomCropFlip,
    RandomErasing,
    batch_augmentation,
    evaluation_transform,
    training_transform,
)
from dgc_fastai.recipe.schema import Data


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
    "name, function",
    [("rand_augment", v2.RandAugment), ("trivial_augment", v2.TrivialAugmentWide)],
    ids=["rand_augment", "trivial_augment"],
)
@pytest.mark.parametrize("channels", [1, 3], ids="channels={}".format)
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

    assert kinds("crop_flip") == kinds("crop_flip", "random_erasing") == ["FileCropFlip"]
    assert kinds("crop_flip", "rand_augment") == ["FileCropFlip", "ToPILImage", "RandAugment", "PILToTensor"]
    # The validation's, then that.
    assert kinds("trivial_augment") == ["Compose", "ToPILImage", "TrivialAugmentWide", "PILToTensor"]
    assert kinds() == ["Compose"]


def picture(height=90, width=120):
    """Smooth colours and a little noise, as in a photograph."""
    torch.manual_seed(0)
    rough = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8), (height, width), mode="bicubic")[0]
    return v2.functional.to_pil_image((255 * rough + 5 * torch.randn(3, height, width)).clamp(0, 255).byte())


def grey_levels(one, other):
    """The largest and the mean absolute difference of two images in bytes."""
    difference = (one.int() - other.int()).abs().float()
    return difference.max(), difference.mean()


@pytest.mark.parametrize("size", [32, 64, 160], ids="size={}".format)
def test_files_are_cropped_and_flipped_as_torchvision_does(size):
    image, ours = picture(), training_transform(Data(name="folder", path=".", size=size))
    theirs = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = ours(image)
        torch.manual_seed(seed)
        of_tensor = theirs(v2.functional.pil_to_tensor(image))
        torch.manual_seed(seed)
        of_pillow = v2.functional.pil_to_tensor(theirs(image))
        assert found.dtype == torch.uint8 and found.shape == (3, size, size)
        assert grey_levels(found, of_tensor)[0] <= 1  # the flip comes before the resize
        # Pillow rounds between its two passes, and its weights to fewer digits.
        most, mean = grey_levels(found, of_pillow)
        assert most <= 2 and mean < 0.05
        seen.add(tuple(found.flatten().tolist()))
    assert len(seen) == 20


def test_validation_is_pillow_s_to_two_grey_levels():
    for shape in ((90, 120), (120, 90), (40, 33), (600, 700)):
        image = picture(*shape)
        expected = v2.functional.pil_to_tensor(v2.Compose([v2.Resize(73), v2.CenterCrop(64)])(image))
        found = evaluation_transform(Data(name="folder", path=".", size=64))(image)
        most, mean = grey_levels(found, expected)
        assert found.shape == (3, 64, 64) and most <= 2 and mean < 0.05


def test_crops_that_are_not_too_large_can_be_left_as_they_are():
    image, sizes = picture(), set()
    for seed in range(30):
        torch.manual_seed(seed)
        resized = FileCropFlip(40)(image)
        torch.manual_seed(seed)
        left = FileCropFlip(40, max_side=80)(image)
        sizes.add(tuple(left.shape[1:]))
        most = grey_levels(v2.functional.resize(left, [40, 40]), resized)[0]
        assert most == 0 and max(left.shape[1:]) <= 80
    assert len(sizes) > 10 and (40, 40) in sizes
