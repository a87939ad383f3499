"""Batches that are prepared beside the step before."""

import gc
import itertools
import multiprocessing

import pytest
import torch

from dgc_fastai.data import image_files
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.data.prefetch import prefetch
from dgc_fastai.utils.errors import RecipeError
from helpers.datasets import folder_data, write_imagenet
from helpers.streams import Stream, queue

CPU = torch.device("cpu")


class Preparation:
    """Copies a number into a tensor, some time after it is asked to."""

    def __init__(self):
        self.asked, self.done = 0, 0

    def __call__(self, batch):
        out = torch.zeros(1)

        def work():
            self.done += 1
            out.fill_(batch)

        self.asked += 1
        queue(work)
        return [(out, "not a tensor"), None]


def test_a_batch_is_ready_when_it_is_given_and_the_next_one_is_queued(streams):
    prepare = Preparation()
    for number, ((out, _), _) in enumerate(prefetch(iter(range(1, 5)), prepare, CPU), 1):
        assert float(out) == number
        assert (prepare.asked, prepare.done) == (min(number + 1, 4), number)
        assert streams[-1] is out and len(streams) == number
    assert number == 4
    assert list(prefetch(iter(()), prepare, CPU)) == []


def test_all_epochs_share_a_stream(streams, monkeypatch):
    made = []

    class Counted(Stream):
        def __init__(self, device):
            super().__init__()
            made.append(device)

    monkeypatch.setattr(torch.cuda, "Stream", Counted)
    for _ in range(3):
        assert list(prefetch(iter(range(2)), lambda number: number, CPU)) == [0, 1]
    assert made == [CPU]


def test_without_a_gpu_nothing_is_prepared_in_advance():
    prepare = Preparation()
    for number, _ in enumerate(prefetch(iter(range(3)), prepare, CPU), 1):
        assert prepare.asked == prepare.done == number


@pytest.mark.parametrize("where", ["reading", "preparing"])
def test_an_error_comes_after_the_batches_before_it(streams, where):
    def numbers():
        yield from (1, 2)
        if where == "reading":
            raise RecipeError("the third is damaged")
        yield 3

    def prepare(number):
        if number == 3:
            raise RecipeError("the third is damaged")
        return number

    seen = []
    with pytest.raises(RecipeError, match="^the third is damaged$"):
        for number in prefetch(numbers(), prepare, CPU):
            seen.append(number)
    assert seen == [1, 2]


def test_a_loop_that_is_left_closes_what_it_reads(streams):
    closed = []

    def numbers():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    batches = prefetch(numbers(), lambda number: number, CPU)
    assert [next(batches), next(batches)] == [0, 1] and not closed
    batches.close()
    del batches
    gc.collect()
    assert closed


@pytest.mark.parametrize("workers", [0, 2], ids="workers={}".format)
@pytest.mark.parametrize("resizing", [(), ("cpu",)], ids=["resized", "crops"])
def test_batches_and_random_numbers_are_the_same(tmp_path, monkeypatch, request, workers, resizing):
    monkeypatch.setattr(image_files, "RESIZING_DEVICES", resizing)
    write_imagenet(tmp_path)
    data = folder_data(tmp_path, workers=workers, augment=["crop_flip", "random_erasing"])
    epochs = []
    for prefetching in (False, True):
        if prefetching:
            request.getfixturevalue("streams")
        torch.manual_seed(0)
        dl = build_dataloaders(data, CPU).train
        dl.set_epoch(seed=0, epoch=0)
        epochs.append([(x, y, torch.rand(1)) for x, y in dl])  # the step draws, too
        assert len(dl) == len(epochs[-1]) == 3
    for one, other in zip(*epochs):
        assert all(torch.equal(*pair) and type(pair[0]) is type(pair[1]) for pair in zip(one, other))


@pytest.mark.parametrize("prefetching", [False, True])
def test_an_error_ends_the_workers_at_once(tmp_path, request, prefetching):
    if prefetching:
        request.getfixturevalue("streams")
    write_imagenet(tmp_path)
    (tmp_path / "train/n01/n01_0.JPEG").write_bytes(b"")
    dl = build_dataloaders(folder_data(tmp_path, workers=2), CPU).train
    gc.disable()  # whatever its traceback refers to
    try:
        with pytest.raises(RecipeError) as error:
            list(dl)
        assert error and not multiprocessing.active_children()
    finally:
        gc.enable()


def test_an_unreadable_image_stops_the_run_at_its_own_batch(tmp_path, streams):
    write_imagenet(tmp_path)
    dl = build_dataloaders(folder_data(tmp_path), CPU).valid
    dl.set_epoch(seed=0, epoch=0)
    (tmp_path / "val/n03/n03_1.JPEG").write_bytes(b"")  # in the second batch of two
    with pytest.raises(RecipeError, match="n03_1.JPEG"):
        for number, _ in enumerate(dl, 1):
            assert number == 1
    assert number == 1
