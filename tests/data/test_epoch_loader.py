"""An epoch that is entered again, at any batch."""

import torch

from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.recipe.schema import Data
from helpers.datasets import folder_data, write_imagenet

CPU = torch.device("cpu")


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
