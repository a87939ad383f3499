"""Saving and loading weights: our safetensors files, and the `.pth.tar` files of the authors' code.

No code from a file is executed: safetensors files cannot contain any, and PyTorch files are read with `weights_only`,
which makes tensors, plain values and the lists of fastai's optimizers.
"""

import re
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from ..layers.dynamic_group_conv import DynamicGroupConv2d
from ..recipe.loading import parse_recipe
from ..recipe.schema import Recipe
from ..utils.errors import CheckpointError, RecipeError
from ..utils.files import write_atomically

__all__ = ["load_checkpoint", "save_checkpoint", "saved_recipe"]


def save_checkpoint(model: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model's parameters and buffers to a safetensors file, atomically. The progress of the gates is a buffer.

    Args:
        model: any module.
        path: the file to write.
        metadata: for the header of the file.

    Raises:
        WriteError: the file cannot be written. A file that was there is unchanged.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state, metadata))


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint, ours or the authors', into a model, and return the model.

    The type of the file is recognized by its content, not by its name. The file and the model must have the same
    tensors.

    Args:
        model: a network of the architecture that the checkpoint was saved from.
        path: a safetensors file, or a PyTorch file with a `state_dict`, ours or the authors'.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or of another network. The model is
            then unchanged.
    """
    state = translate(read_tensors(Path(path)), model, path)
    check_fit(model, state, path)
    model.load_state_dict(state)
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of the state dict in a PyTorch file, by name.

    Raises:
        CheckpointError: the file is missing, damaged, holds more than weights, or no state dict.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error.strerror}") from None
    try:
        if head[8:9] == b"{":  # safetensors: the length in eight bytes, then a JSON header
            return safetensors.torch.load_file(path)
        from fastcore.foundation import L  # slow to import

        with warnings.catch_warnings(), torch.serialization.safe_globals([L]):
            warnings.simplefilter("ignore")  # about a file that it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each parser raises errors of its own
        reason = "it holds more than weights" if "Unsupported" in str(error) else "damaged or not a checkpoint"
        lines = str(error).strip().split("\n")
        detail = next((line for line in lines if "Unsupported" in line), lines[0]).strip()[:120]
        raise CheckpointError(f"{path}: cannot read the checkpoint: {reason} ({detail})") from None
    state = content
    for key in ("state_dict_ema", "state_dict", "model"):  # timm's averaged weights, the authors', fastai's
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            state = content[key]
            break
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not state or not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: cannot read the checkpoint: it holds no state_dict")
    return state


# The authors' names -> ours. A name that matches no pattern is already ours.
_RENAMES: list[tuple[str, Any]] = [
    (r"^module\.", ""),
    (r"^features\.init_conv\.", "stem."),
    (r"^features\.denseblock_(\d+)\.denselayer_(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.layers.{int(m[2]) - 1}."),
    (r"\.conv_([12])\.", r".conv\1."),
    (r"^bn_last\.", "norm."),
    (r"\.downsample\.1\.norm\.", ".downsample.1."),
    (r"(^|\.)_inactive_channels$", r"\1inactive_channels"),
]
_HEAD = re.compile(r"^(.*?)headconv_(\d+)\.(conv\.weight|fc1\.weight|fc2\.weight|fc2\.bias)$")
_HEAD_NAMES = {"fc1.weight": "gates.squeeze", "fc2.weight": "gates.excite", "fc2.bias": "gates.bias"}


def translate(state: dict[str, Tensor], network: nn.Module | None = None, source: str | Path = "") -> dict[str, Tensor]:
    """The authors' state dict with our names and the heads in one tensor; one of ours as it is.

    Args:
        network: names of its own stay.
        source: of the tensors, for errors.

    Raises:
        CheckpointError: the heads of a layer have other shapes than each other, or names are not text.
    """
    try:
        return _translate(state, network.state_dict() if network else ())
    except (IndexError, RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0][:120]
        raise CheckpointError(f"{source}: does not fit {type(network).__name__}: {reason}") from None


def _translate(state: dict[str, Tensor], known: Container[str]) -> dict[str, Tensor]:
    ours: dict[str, Any] = {}
    heads: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in state.items():
        for pattern, replacement in _RENAMES if name not in known else ():
            name = re.sub(pattern, replacement, name)
        head = _HEAD.match(name)
        if head:
            heads.setdefault((head[1], head[3]), {})[int(head[2])] = tensor
        elif name.endswith("inactive_channels"):
            ours[name] = tensor.reshape(()).long()
        else:
            ours[name] = tensor
    for (layer, kind), tensors in heads.items():
        ordered = [tensors[head] for head in sorted(tensors)]
        if kind == "conv.weight":  # filter j of head h becomes output channel j * heads + h
            ours[layer + "weight"] = torch.stack(ordered, dim=1).flatten(0, 1)
        else:
            ours[layer + _HEAD_NAMES[kind]] = torch.stack(ordered)
    return ours


def _can_copy(source: Tensor, target: Tensor) -> bool:
    """Whether a tensor from a file fits one of the model: float to float of any size, integer to integer."""
    plain = source.layout == torch.strided and source.device.type == "cpu" and not source.is_quantized
    return plain and source.is_floating_point() == target.is_floating_point() and not source.is_complex()


def saved_recipe(path: str | Path) -> Recipe | None:
    """The recipe in the weights of a run; None for other files."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            recipe = (file.metadata() or {})["recipe"]
        return parse_recipe(recipe, str(path))
    except (OSError, safetensors.SafetensorError, KeyError, RecipeError):
        return None


def check_fit(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Check that tensors are those of a network.

    Args:
        path: of the tensors, for errors; a run's weights tell their network.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or type, or a layer's number of inactive
            channels is none.
    """
    expected = model.state_dict()
    problems = []
    for kind, names in (
        ("missing", [name for name in expected if name not in state]),
        ("unexpected", [name for name in state if name not in expected]),
        (
            "of another shape",
            [
                f"{name} {list(state[name].shape)} for {list(tensor.shape)}"
                for name, tensor in expected.items()
                if name in state and state[name].shape != tensor.shape
            ],
        ),
        (
            "of another type",
            [
                f"{name} {state[name].dtype}".replace("torch.", "")
                for name, tensor in expected.items()
                if name in state and not _can_copy(state[name], tensor)
            ],
        ),
    ):
        if names:
            shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:3])
            problems.append(f"{len(names)} {kind} ({shown}{', ...' if len(names) > 3 else ''})")
    if problems:
        recipe = saved_recipe(path)
        saved, arch = recipe and recipe.model.arch, (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
        if saved and arch and saved != arch:
            raise CheckpointError(f"{path}: holds weights of {saved}, which do not fit {arch}")
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: {'; '.join(problems)}")
    for prefix, module in model.named_modules():
        if isinstance(module, DynamicGroupConv2d):
            name = f"{prefix}.inactive_channels".lstrip(".")
            inactive, size = int(state[name]), module.granularity
            if not 0 <= inactive < module.in_channels or inactive % size:
                blocks = f" in blocks of {size}" if size > 1 else ""
                raise CheckpointError(f"{path}: {name} is {inactive}, of {module.in_channels} channels{blocks}")
