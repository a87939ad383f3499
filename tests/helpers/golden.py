"""Reading the reference's numbers in tests/data, and what several tests do with networks."""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch.testing import assert_close

DATA = Path(__file__).parents[1] / "data" / "golden"
sys.path.insert(0, str(DATA))

from make_state import make_state  # noqa: E402, F401

from dgc_fastai import DynamicGroupConv2d, gate_penalty, set_progress  # noqa: E402
from dgc_fastai.models.checkpoints import translate  # noqa: E402

LAYERS = sorted(DATA.glob("layer_*.safetensors"))


def read(name):
    """The tensors and the metadata of a golden file."""
    with safe_open(DATA / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


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

    from dgc_fastai.data.in_memory import TensorDL, TensorImages

    vocab = [str(n) for n in range(10)]
    splits = (TensorImages(images, labels, vocab, split_idx) for split_idx in (0, 1))
    return DataLoaders(*(TensorDL(split, bs=size, num_workers=0, device="cpu") for split in splits), device="cpu")


def golden_layer(path, **keywords):
    tensors, metadata = read(path.name)
    progress, gate_factor = float(metadata.pop("progress")), float(metadata.pop("gate_factor"))
    geometry = {key: int(value) for key, value in metadata.items()}
    layer = DynamicGroupConv2d(**geometry, gate_factor=gate_factor, **keywords)
    layer.load_state_dict(translate(group(tensors, "state.")))
    return layer, tensors, progress


def check_golden_layer(path, **keywords):
    layer, golden, progress = golden_layer(path, **keywords)
    set_progress(layer, progress)
    x = golden["x"].clone().requires_grad_()

    y = layer.train()(x)
    close(y, golden["train.y"], 1e-5)
    close(gate_penalty(layer), golden["train.lasso"][0], 1e-5)
    assert layer.inactive_channels == golden["train.inactive_channels"]
    close(layer.norm.running_mean, golden["after.running_mean"], 1e-5)
    close(layer.norm.running_var, golden["after.running_var"], 1e-5)

    ((y * golden["train.gy"]).sum() / y.numel() + 0.5 * gate_penalty(layer)).backward()
    close(x.grad, golden["train.grad.x"], 2e-4)
    gradients = translate(group(golden, "train.grad."))
    del gradients["x"]
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        close(parameter.grad, gradients[name], 2e-4)

    close(layer.eval()(golden["x"]), golden["eval.y"], 1e-5)
