"""MixUp, CutMix, and both."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp

from helpers.runs import trained


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
    assert [type(mixer) for mixer in mixers] == [MixUp, CutMix]
    assert [float(mixer.distrib.concentration0) for mixer in mixers] == pytest.approx([0.3, 0.7])
    assert 5 < seen.count("mixup") < 24 and len(seen) == 29
    assert type(learn.loss_func).__name__ == "CrossEntropyLossFlat"  # and is itself again
