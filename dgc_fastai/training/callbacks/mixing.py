"""MixUp and CutMix together."""

import torch
from fastai.callback.mixup import CutMix, MixHandler, MixUp


class MixUpOrCutMix(MixHandler):
    """fastai's MixUp or its CutMix, chosen for each batch with equal probability.

    Args:
        mixup, cutmix: alpha of each one's beta distribution.
    """

    def __init__(self, mixup: float, cutmix: float):
        super().__init__()
        self.choices = MixUp(mixup), CutMix(cutmix)

    def before_batch(self):
        choice = self.choices[int(torch.rand(()) < 0.5)]
        choice.learn, choice.stack_y = self.learn, self.stack_y
        choice.before_batch()
        self.lam, self.yb1 = choice.lam, choice.yb1
