"""The data pipeline: what the device computes of it is what a CPU computes, in the same order."""

import pytest
import torch

from dgc_fastai import load_recipe
from dgc_fastai.data.loaders import build_dataloaders
from helpers import QUICKSTART
from helpers.datasets import folder_data, write_imagenet
from helpers.gpu import DEVICE, DRY_RUN

CPU = torch.device("cpu")


def batches(data, device, split, epoch):
    torch.manual_seed(0)
    loader = build_dataloaders(data, device)[split]
    loader.set_epoch(0, epoch)
    return [(x.cpu().contiguous(), y.cpu()) for x, y in loader]


@pytest.mark.parametrize("split", [0, 1], ids=["train", "valid"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_image_files_are_those_of_a_cpu(tmp_path, workers, split):
    if DRY_RUN and workers:
        pytest.skip("the ordinary tests do this")
    write_imagenet(tmp_path / "images", train=7, valid=5)
    data = folder_data(tmp_path / "images", size=32, workers=workers)
    level = 1 / 255 / min(data.statistics[1])
    for epoch in range(2):
        ours, theirs = batches(data, DEVICE, split, epoch), batches(data, CPU, split, epoch)
        assert len(ours) == len(theirs)
        for (x, y), (expected, labels) in zip(ours, theirs):
            assert torch.equal(y, labels) and x.dtype == torch.float32
            assert (x - expected).abs().max() < 2.01 * level, "two gray levels"


def test_an_epoch_can_be_left_and_begun_again(tmp_path):
    """Nothing that was prefetched for the one that was left comes in the next."""
    write_imagenet(tmp_path / "images", train=12)
    loader = build_dataloaders(folder_data(tmp_path / "images", size=32), DEVICE).train
    loader.set_epoch(0, 0)
    first = next(iter(loader))[1].cpu()
    loader.set_epoch(0, 0)
    labels = [y.cpu() for _, y in loader]
    assert torch.equal(labels[0], first) and sum(map(len, labels)) == loader.n


def test_batches_of_a_small_set_stay_on_the_device():
    loader = build_dataloaders(load_recipe(QUICKSTART).data, DEVICE).train
    loader.set_epoch(0, 0)
    seen = 0
    for x, y in loader:
        assert x.device == y.device == DEVICE and x.isfinite().all()
        seen += len(x)
    assert seen == loader.n
