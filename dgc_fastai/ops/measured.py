"""Which of two backends is the faster one for a layer on this GPU: measured once, and kept in the user's cache.

The cache is a file for each GPU model and version of PyTorch, Triton and the kernels. One process on each machine
measures; the others find its answers in the file, and until then use the backend that needs no measurement.
"""

import functools
import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils import launch
from ..utils.errors import WriteError
from ..utils.files import write_atomically
from .backends.base import Backend, Norm
from .backends.per_sample import is_channels_last, memory_format
from .backends.triton_support import triton_version
from .build import cache_folder
from .conv_desc import ConvDesc
from .precision import convolutions_use_tf32, products_like_convolutions

__all__ = ["cache_file", "faster", "measured_layers"]

MARGIN = 0.97  # of the time of the other: noise should not decide
REPETITIONS = 7
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # TF32 has as many digits as float16

log = logging.getLogger(__name__)

_layers: dict[Path, dict[str, dict]] = {}  # by file: what is known of it in this process
_stamps: dict[Path, int] = {}  # when each file had been changed last when it was read


def faster(plain: Backend, candidate: Backend, desc: ConvDesc, x: Tensor, weight: Tensor, fused: bool) -> Backend:
    """`candidate` if it was measured to be faster than `plain`, which runs until then.

    Measured are forward and backward pass together, when a layer is first seen; see `can_measure`. If the numbers of
    the two differ, `plain` it is.

    Args:
        x: [B, C, H, W], of the type and in the memory format that the layer is computed in.
        weight: [O, C, kh, kw].
        fused: whether normalization and ReLU before the convolution are part of the layer.
    """
    if not x.numel() or isinstance(x, torch._subclasses.FakeTensor):
        return plain
    file = cache_file(x.device)
    tf32 = x.dtype == torch.float32 and convolutions_use_tf32()
    key = layer_key(desc, "tf32" if tf32 else str(x.dtype), is_channels_last(x), fused)
    known = _layers.setdefault(file, {})
    if key not in known:
        _read(file)  # another process may have measured it
    if key not in known and can_measure():
        known[key] = _measure((plain, candidate), desc, x, weight, fused)
        if "milliseconds" in known[key]:  # what failed may work next time
            _write(file, key, known[key], x.device)
    return candidate if known.get(key, {}).get("backend") == candidate.name else plain


def can_measure() -> bool:
    """Whether events can be timed now: not while a CUDA graph is captured, nor where a mode or a transform would see
    the operators; and by one process of each machine, so that all choose alike."""
    return (
        launch.local_rank() == 0
        and not torch.cuda.is_current_stream_capturing()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


@functools.lru_cache(4096)
def layer_key(desc: ConvDesc, number: str, channels_last: bool, fused: bool) -> str:
    """A layer in words. Batches count by the next power of two, so that few smaller last ones are measured again."""

    def pair(sizes: tuple[int, int]) -> str:
        return "x".join(map(str, sizes))

    batch = 1 << max(desc.batch - 1, 0).bit_length()
    parts = [
        f"{batch}x{desc.channels}x{pair(desc.in_size)} to {desc.heads}x{desc.filters}",
        *(f"{name} {pair(getattr(desc, name))}" for name in ("kernel_size", "stride", "padding", "dilation")),
        number.removeprefix("torch."),
        "channels_last" if channels_last else "contiguous",
    ]
    return ", ".join(parts + ["norm"] * fused)


def _about(device: torch.device) -> dict[str, str | None]:
    """What the answers depend on, besides the layer."""
    sources = b"".join(path.read_bytes() for path in sorted((Path(__file__).parent / "backends").glob("*.py")))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "sources": hashlib.sha256(sources).hexdigest()[:16],
    }


@functools.cache
def cache_file(device: torch.device) -> Path:
    """The file for this GPU model and these versions."""
    about = json.dumps(_about(device))
    return cache_folder() / f"backends-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def measured_layers(file: Path) -> dict[str, dict]:
    """By layer, as `layer_key` writes it: the "backend" chosen and the "milliseconds" of both. None from a file that is
    missing, damaged or somebody else's."""
    try:
        layers = json.loads(file.read_text())["layers"]
        return {key: entry for key, entry in layers.items() if isinstance(entry["backend"], str)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _measure(backends: Sequence[Backend], desc: ConvDesc, x: Tensor, weight: Tensor, fused: bool) -> dict:
    """The entry of a layer in the file; empty if there is not enough memory to measure now."""
    plain, candidate = backends
    _announce()
    with torch.no_grad(), torch.cuda.device_of(x), products_like_convolutions(x):
        try:
            steps = [_step(backend, desc, x, weight, fused) for backend in backends]
            expected = steps[0]()  # outside of what follows: if it fails, the layer does
            try:
                error = _largest_error(steps[1](), expected)
                del expected
                if not error < TOLERANCE[x.dtype]:
                    raise ArithmeticError(f"its numbers are wrong by {error:.1e}")
                times = time_steps(steps)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may say; what does not run here is not the faster one
                reason = str(error).partition("\n")[0]
                log.warning("Backend %s does not work on this GPU for %s: %s", candidate.name, desc, reason)
                return {"backend": plain.name}
        except torch.OutOfMemoryError:
            return {}
    chosen = candidate if times[1] < MARGIN * times[0] else plain
    rounded = {backend.name: round(time, 4) for backend, time in zip(backends, times)}
    return {"backend": chosen.name, "milliseconds": rounded}


@functools.cache
def _announce() -> None:
    # A warning, since these are shown, and a slow first step would need an explanation.
    log.warning("Measuring which backend is the fastest for each DGC layer, once on this GPU: takes a minute or two")


def _largest_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Relative to the largest value of each tensor."""
    errors = [(one.float() - other).abs().max() / other.abs().max() for one, other in zip(ours, theirs, strict=True)]
    return float(torch.stack(errors).max())


def _step(backend: Backend, desc: ConvDesc, x: Tensor, weight: Tensor, fused: bool) -> Callable[[], list[Tensor]]:
    """A forward and backward pass of a layer, which returns the output and the gradients. A quarter of the gates is
    closed; to know how many of the layer's are would stall the GPU."""
    gates = x.new_ones(desc.batch, desc.heads, desc.channels, dtype=torch.float32)
    scale, shift = gates.new_ones(desc.channels), gates.new_zeros(desc.channels)
    generator = torch.Generator(x.device).manual_seed(0)  # its own, so that a run's random numbers stay what they are
    # Numbers of ours: x and weight may be memory that is not filled yet, and NaN takes longer.
    grad = torch.empty(desc.output_shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    x, weight = (
        torch.empty(one.shape, dtype=one.dtype, device=one.device, memory_format=memory_format(one))
        for one in (x, weight)
    )
    for one in (grad, x, weight):
        one.normal_(generator=generator)
    gates.uniform_(-0.5, 1.5, generator=generator).relu_()

    def step() -> list[Tensor]:
        if not fused or backend.fuses_norm:
            norm = Norm(scale, shift) if fused else None
            y = backend.forward(desc, x, gates, weight, norm)
            dx, dgates, dweight, *dnorm = backend.backward(desc, grad, x, gates, weight, norm).summed(weight)
        else:
            statistics_ = shift, scale  # a mean of zero and a variance of one
            u = F.batch_norm(x, *statistics_, scale, shift).relu_()
            y = backend.forward(desc, u, gates, weight)
            du, dgates, dweight, *_ = backend.backward(desc, grad, u, gates, weight).summed(weight)
            du = torch.ops.aten.threshold_backward(du, u, 0)
            normalized = x, scale, *statistics_, None, None, False, 1e-5, [True, True, True]
            dx, *dnorm = torch.ops.aten.native_batch_norm_backward(du, *normalized)
        return [y, dx, dgates * (gates != 0), dweight, *(dnorm if fused else ())]

    return step


def time_steps(steps: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds that each takes on the GPU: medians of runs that take turns, after some to compile and tune them."""
    for _ in range(3):
        for step in steps:
            step()
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(REPETITIONS):
        for step, mine in zip(steps, times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            mine.append(start.elapsed_time(end))
    return [statistics.median(mine) for mine in times]


def _read(file: Path) -> None:
    """Learn what the file says, if it has changed."""
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        return
    if stamp != _stamps.get(file):
        _stamps[file] = stamp
        _layers[file].update(measured_layers(file))


def _write(file: Path, key: str, entry: dict, device: torch.device) -> None:
    layers = measured_layers(file) | {key: entry}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(_about(device) | {"layers": layers}, indent=1))
    except (OSError, WriteError) as error:
        log.warning("The fastest backends will be measured again next time: %s", error)
