"""MixUp, CutMix, and both."""

from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp

from dgc_fastai.training.callbacks import DeviceCutMix, DeviceMixUp
from helpers.fake_gpu import fake_gpu
from helpers.runs import trained


@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
@pytest.mark.parametrize("kinds", [(MixUp, DeviceMixUp), (CutMix, DeviceCutMix)], ids=["mixup", "cutmix"])
def test_batches_and_random_numbers_are_fastai_s_to_the_bit(kinds, size):
    found = []
    for kind in kinds:
        torch.manual_seed(1)
        images, labels = torch.randn(6, 3, *size), torch.randint(10, (6,))
        steps, mixer = [], kind(0.5)
        for _ in range(20):
            learn = SimpleNamespace(xb=(images.clone(),), yb=(labels,), y=labels)
            learn.x = learn.xb[0]
            mixer.learn, mixer.stack_y = learn, True
            mixer.before_batch()
            steps += [learn.xb[0], mixer.lam.reshape(-1), mixer.yb1[0], torch.rand(1)]
        found.append(steps)
    for ours, theirs in zip(*found):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [DeviceMixUp, DeviceCutMix])
def test_a_gpu_is_not_waited_for(kind):
    with fake_gpu() as gpu:
        mixer, images = kind(0.5), torch.ones(6, 3, 8, 8, device="cuda")
        mixer.learn = SimpleNamespace(xb=(images,), x=images, y=torch.ones(6, dtype=torch.long, device="cuda"))
        with gpu.counting() as counts:
            mixer.before_batch()
        assert counts.copies and not counts.syncs
        assert mixer.lam.is_cuda and mixer.yb1[0].is_cuda


def test_mixing_is_fastai_s_and_by_a_coin_if_both_are_named():
    assert trained("train.mixup=0.3").mix_up.distrib.concentration0 == 0.3
    assert trained("train.cutmix=0.7").cut_mix.distrib.concentration0 == 0.7
    seen = []

    class Kind(Callback):
        order = 90

        def before_batch(self):
            if self.training:
                lam = self.mix_up_or_cut_mix.lam
                seen.append("mixup" if lam.numel() > 1 else "cutmix")
                # The loss is that of both labels, in the shares of the mixture.
                mixed = self.mix_up_or_cut_mix.lf(pred := torch.randn(len(self.y), 10), self.y)
                both = [
                    torch.nn.functional.cross_entropy(pred, y, reduction="none")
                    for y in (self.y, self.mix_up_or_cut_mix.yb1[0])
                ]
                torch.testing.assert_close(mixed, (lam * both[0] + (1 - lam) * both[1]).mean())

    learn = trained("train.mixup=0.3", "train.cutmix=0.7", "data.batch_size=50", callbacks=[Kind()])
    mixers = learn.mix_up_or_cut_mix.choices
    assert isinstance(mixers[0], MixUp) and isinstance(mixers[1], CutMix)
    assert [float(mixer.distrib.concentration0) for mixer in mixers] == pytest.approx([0.3, 0.7])
    assert 5 < seen.count("mixup") < 24 and len(seen) == 29
    assert type(learn.loss_func).__name__ == "CrossEntropyLossFlat"  # and is itself again
