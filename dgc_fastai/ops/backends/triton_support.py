"""Whether Triton's kernels run here: when they are first used, Triton compiles them, which may need a C compiler."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

__all__ = ["triton_runs", "triton_version"]

log = logging.getLogger(__name__)


def triton_runs(x: Tensor) -> bool:
    """Whether Triton is installed and a kernel has run on the GPU of x; elsewhere, whether its interpreter is on."""
    if not _is_installed():
        return False
    if not x.is_cuda:
        return os.environ.get("TRITON_INTERPRET") == "1"
    return isinstance(x, torch._subclasses.FakeTensor) or _runs_on(x.device)


def triton_version() -> str | None:
    """Of the installed Triton, which comes in distributions of several names; None without one."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _runs_on(device: torch.device) -> bool:
    try:
        from . import triton_skipping

        gates = torch.zeros(1, 1, 16, device=device)
        with torch.cuda.device_of(gates):
            triton_skipping.list_kept(gates)
    except Exception as error:  # of compilers, drivers and versions that do not fit
        reason = str(error).partition("\n")[0]
        log.warning("Triton does not work on %s, so DGC layers take longer: %s", device, reason)
        return False
    return True
