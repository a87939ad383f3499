"""Reading the reference's numbers in tests/data, and what several tests do with networks."""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch.testing import assert_close

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))

from make_state import make_state  # noqa: E402, F401

LAYERS = sorted(DATA.glob("layer_*.safetensors"))


def read(name):
    """The tensors and the metadata of a golden file."""
    with safe_open(DATA / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def read_json(name):
    return json.loads((DATA / name).read_text())


def group(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def close(actual, expected, relative):
    """Equal to `relative` times the expected tensor's largest magnitude."""
    assert_close(actual, expected, rtol=relative, atol=relative * float(expected.detach().abs().max()))


def tiny_densenet(**kwargs):
    import timm

    import dgc_fastai  # noqa: F401

    return timm.create_model("dgc_densenet86", stages=(2, 2, 2), num_classes=10, **kwargs)


def equal_states(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def evaluating(model, x):
    """The model in evaluation mode, with the norm statistics of one batch: differences are not drowned there."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def loaders(images, labels, size):
    """The same images to train and to validate with, as a small set."""
    from fastai.data.core import DataLoaders

    from dgc_fastai.data import TensorDL, TensorImages

    vocab = [str(n) for n in range(10)]
    splits = (TensorImages(images, labels, vocab, split_idx) for split_idx in (0, 1))
    return DataLoaders(*(TensorDL(split, bs=size, num_workers=0, device="cpu") for split in splits), device="cpu")
