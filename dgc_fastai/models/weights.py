"""The weights that a run starts from: a file's, timm's, or those of a repository of the Hugging Face Hub."""

import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch.nn as nn
from timm.models import load_model_config_from_hf, load_state_dict_from_hf
from torch import Tensor

from ..layers.gate_schedule import dgc_layers
from ..recipe.schema import Model
from ..utils.errors import CheckpointError
from .checkpoints import check_fit, read_tensors, translate
from .efficientnet_names import with_timm_names

__all__ = ["OtherClasses", "Weights", "load_weights", "read_weights"]


class OtherClasses(CheckpointError):
    """The weights are of a network for other classes."""


HUB = "hf-hub:"
GATES = (".gates.", ".inactive_channels")


@dataclass(frozen=True)
class Weights:
    """The tensors of a network, and where they come from: timm's name, such as "resnet18.a1_in1k", or a file."""

    state: dict[str, Tensor]
    source: str

    @property
    def have_gates(self) -> bool:
        """Whether they are of a network with DGC layers, ours or the authors'."""
        return any(name.endswith("inactive_channels") for name in self.state)


def read_weights(model: Model, in_chans: int) -> Weights:
    """Read the weights that a recipe's network starts from.

    Args:
        model: with `weights`.
        in_chans: number of channels of the images; timm fits its own weights to them.

    Raises:
        CheckpointError: they can be neither fetched nor found in the cache; or the file cannot be read; or they belong
            to another architecture.
    """
    assert model.weights
    if model.weights.startswith(HUB):
        return _from_hub(model)
    if file := model.weights_file:
        file = file / "best.safetensors" if file.is_dir() else file
        return Weights(read_tensors(file), str(file))
    if not model.timm_name:
        raise CheckpointError(f"timm has no weights for {model.arch} with these keywords")
    network = _fetch(model.timm_name, in_chans)
    cfg: Any = network.pretrained_cfg
    return Weights(network.state_dict(), ".".join(part for part in (cfg["architecture"], cfg["tag"]) if part))


def load_weights(network: nn.Module, weights: Weights, with_classifier: bool = False) -> str:
    """Load weights into a network, except for the classifier if theirs has other classes, or is missing.

    Weights without gates, in a network that has gates, open these: it then computes what the dense network does.

    Args:
        network: of the same layout; timm's, torchvision's where it is the same, or one of this package.
        with_classifier: refuse weights whose classifier does not fit.

    Returns:
        Their source, and what was left out.

    Raises:
        CheckpointError: they do not fit; `OtherClasses` if that is the classifier.
    """
    expected = network.state_dict()
    state = _with_names_of(network, weights)
    source, classifiers = weights.source, _classifiers(network)
    head = [name for name in expected if name.startswith(classifiers)]
    if any(name not in state or state[name].shape != expected[name].shape for name in head):
        classes = next((_length(state[name]) for name in reversed(head) if name in state), 0)
        if with_classifier and classes:
            wanted = len(expected[head[-1]])
            raise OtherClasses(f"{source}: a network of {classes:,} classes cannot teach one of {wanted:,}")
        source += f", without its classifier of {classes:,} classes" if classes else ", which has no classifier"
        if not with_classifier:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(classifiers)}
            state |= {name: expected[name] for name in head}
    _check_channels(state, expected, weights.source)
    has_to_open = not weights.have_gates and bool(dgc_layers(network))
    for name, tensor in expected.items():
        # Files of old versions of PyTorch do not count batches.
        if name.endswith("num_batches_tracked") or (has_to_open and any(part in f".{name}" for part in GATES)):
            state.setdefault(name, tensor)
    check_fit(network, state, weights.source)
    network.load_state_dict(state)
    for layer in dgc_layers(network) if has_to_open else ():
        layer.open_gates()
    return source


def _with_names_of(network: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Weights by the names that a network has for them; timm knows those of others for some of its networks."""
    expected = network.state_dict()
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in weights.state.items()}
    if "_conv_stem.weight" in state:
        state = with_timm_names(state, network)
    filters = vars(sys.modules[type(network).__module__])
    rename: Callable | None = filters.get("checkpoint_filter_fn") or filters.get("_filter_fn")
    if rename and expected.keys() - state.keys():
        try:
            renamed = dict(rename(dict(state), network))
            state = max(state, renamed, key=lambda some: len(expected.keys() & some.keys()))
        except Exception as error:  # made for other files than this one
            logging.getLogger(__name__).debug("timm cannot rename the weights of %s: %s", weights.source, error)
    return translate(state, network, weights.source)


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    """The prefixes of the names of a network's classifier; the last layer with weights if timm does not tell."""
    named = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if not named:
        named = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _check_channels(state: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """Name the usual reason why a single convolution does not fit, the first one."""
    differ = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if len(differ) == 1 and state[differ[0]].dim() == expected[differ[0]].dim() == 4:
        theirs, ours = state[differ[0]].shape, expected[differ[0]].shape
        if theirs[0] == ours[0] and theirs[2:] == ours[2:]:
            raise CheckpointError(
                f"{source}: its network takes images of {_channels(theirs[1])}, and these have {_channels(ours[1])}"
            )


def _channels(count: int) -> str:
    return "1 channel" if count == 1 else f"{count} channels"


def _from_hub(model: Model) -> Weights:
    source = model.weights or ""
    repository = source.removeprefix(HUB)
    with _errors_as(f"cannot fetch {source}"):
        _, arch, _ = load_model_config_from_hf(repository)
    if model.timm_name is None or arch != model.timm_name.partition(".")[0]:
        raise CheckpointError(f"{source}: holds weights of {arch}, which do not fit {model.arch}")
    with _errors_as(f"cannot fetch {source}"):
        return Weights(dict(load_state_dict_from_hf(repository, weights_only=True)), source)


def _fetch(name: str, in_chans: int) -> nn.Module:
    with _errors_as(f"cannot fetch timm's weights of {name}"):
        return timm.create_model(name, pretrained=True, in_chans=in_chans)


@contextmanager
def _errors_as(text: str):
    """What the network, the hub or a damaged file in its cache raises, as one line; without the hub's own warnings."""
    level = logging.getLogger("huggingface_hub").level
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a warning at each of five attempts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = str(error).split(". ")[0].strip().split("\n")[0]
        raise CheckpointError(f"{text}: {reason or type(error).__name__}") from None
    finally:
        logging.getLogger("huggingface_hub").setLevel(level)
