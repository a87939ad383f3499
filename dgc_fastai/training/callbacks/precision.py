"""Mixed precision."""

from typing import Any

import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision

from ...ops.device import select_precision


class DeviceMixedPrecision(MixedPrecision):
    """fastai's MixedPrecision on the network's device, which may be a CPU.

    Raises:
        RecipeError: in `before_fit`, if it is bf16 and the GPU only emulates that.
    """

    state_key = "loss_scaler"

    def before_fit(self):
        device = next(self.model.parameters()).device
        if self.amp_mode is AMPMode.BF16:
            select_precision("bf16", device)
        dtype = {AMPMode.BF16: torch.bfloat16, AMPMode.FP16: torch.float16}[self.amp_mode]
        self.kwargs["enabled"] = dtype is torch.float16
        self.autocast, self.scales = torch.autocast(device.type, dtype), []
        self.learn.scaler = torch.amp.GradScaler(device.type, **self.kwargs)

    def state_dict(self) -> dict[str, Any]:
        return self.learn.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learn.scaler.load_state_dict(state)
