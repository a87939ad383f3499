"""Mixed precision."""

from typing import Any

import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision


class DeviceMixedPrecision(MixedPrecision):
    """fastai's MixedPrecision on the network's device, which may be a CPU.

    Raises:
        ValueError: in `before_fit`, if the GPU does not support bfloat16.
    """

    state_key = "loss_scaler"

    def before_fit(self):
        device = next(self.model.parameters()).device.type
        dtype = {AMPMode.BF16: torch.bfloat16, AMPMode.FP16: torch.float16}[self.amp_mode]
        if device == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise ValueError("this GPU does not support bfloat16: use float32 or fp16")
        self.kwargs["enabled"] = dtype is torch.float16
        self.autocast, self.scales = torch.autocast(device, dtype), []
        self.learn.scaler = torch.amp.GradScaler(device, **self.kwargs)

    def state_dict(self) -> dict[str, Any]:
        return self.learn.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learn.scaler.load_state_dict(state)
