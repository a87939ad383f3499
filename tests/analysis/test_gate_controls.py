"""Gates that are not those of the image: what the layers then compute, and what a network loses."""

import pytest
import torch
import torch.nn as nn

from dgc_fastai import DynamicGroupConv2d, gate_controls, gate_penalty, replaced_gates
from dgc_fastai.ops import use_backend
from dgc_fastai.ops.gates import drop_smallest, pool
from dgc_fastai.ops.reference import gated_conv2d
from dgc_fastai.utils.errors import UserError
from helpers.selecting import Selecting, images_of_classes


def layer_and_images(inactive=9):
    layer = DynamicGroupConv2d(12, 8, 3, padding=1, heads=2, squeeze_rate=2, preact=False).eval()
    layer.inactive_channels.fill_(inactive)
    return layer, torch.rand(5, 12, 6, 6)


def convolved(layer, x, gates):
    return gated_conv2d(x, gates, layer.weight, None, None, layer.stride, layer.padding, layer.dilation)


def kept_by(layer, x):
    return drop_smallest(layer.gates(pool(x)), layer.inactive_channels)


def largest(gates, count):
    """[heads, C] with all but the `count` largest of each row set to zero."""
    return gates * (gates >= gates.sort(1).values[:, -count, None])


def test_definitions():
    layer, x = layer_and_images()  # three of twelve channels are kept
    with torch.no_grad():
        layer.gates.bias.copy_(1 + 0.1 * torch.randn(2, 12))
        own, kept = layer(x), kept_by(layer, x)
        assert ((kept > 0).sum(2) == 3).all() and not torch.equal(kept[0] > 0, kept[1] > 0)
        expected = {
            "another_image": kept[[4, 0, 1, 2, 3]],
            "mean": largest(kept.mean(0), 3).expand(5, -1, -1),
            "input_free": largest(layer.gates.bias, 3).expand(5, -1, -1),
        }
        for kind, gates in expected.items():
            with replaced_gates(layer, kind):
                torch.testing.assert_close(layer(x), convolved(layer, x, gates))
            assert not torch.allclose(own, convolved(layer, x, gates)), kind
        assert torch.equal(layer(x), own)


def test_the_kernels_of_whole_layers_give_way():
    pytest.importorskip("triton")
    layer, x = layer_and_images()
    with torch.no_grad(), use_backend("triton"):
        with replaced_gates(layer, "another_image"):
            found = layer(x)
        torch.testing.assert_close(found, convolved(layer, x, kept_by(layer, x).roll(1, 0)), rtol=1e-4, atol=1e-4)


def test_input_free_gates_are_learned_without_the_image():
    layer, x = layer_and_images()
    layer.train()
    with replaced_gates(layer, "input_free"):
        (layer(x).square().mean() + gate_penalty(layer)).backward()
    assert layer.gates.squeeze.grad is layer.gates.excite.grad is None
    assert (layer.gates.bias.grad != 0).all()  # the penalty reaches dropped channels, too


def test_networks_that_select_need_their_own_gates_and_others_do_not():
    images, labels = images_of_classes()
    batches = list(zip(images.split(33), labels.split(33)))  # the last batch has two images
    found = gate_controls(Selecting(True), batches)
    assert found["images"] == 200 and found["own"] == 1
    other = found["another_image"]
    right = torch.cat([part == part.roll(1) for part in labels.split(33)]).float()  # else the other's class is chosen
    assert other["accuracy"] == pytest.approx(float(right.mean()))
    assert other["same_class"] == other["accuracy"]
    assert other["difference"] == pytest.approx(float(right.mean()) - 1)
    assert other["standard_error"] == pytest.approx(float((right - 1).std(unbiased=False)) / 200**0.5)
    assert found["mean"]["accuracy"] < 0.7
    fixed = gate_controls(Selecting(False), batches)
    for kind in ("another_image", "mean"):
        assert fixed[kind]["accuracy"] == fixed["own"] == 1
        assert fixed[kind]["difference"] == fixed[kind]["standard_error"] == 0


def test_an_image_alone_has_no_other():
    images, labels = images_of_classes(9)
    model = Selecting(True)
    found = gate_controls(model, list(zip(images.split(4), labels.split(4))))
    assert found["images"] == 8
    with pytest.raises(ValueError, match="batches of two images or more"):
        gate_controls(model, list(zip(images.split(1), labels.split(1))))
    with pytest.raises(ValueError, match="no other image"), replaced_gates(model, "another_image"):
        model(images[:1])
    assert not model.layer.gates._forward_hooks, "hooks are removed after an error"


def test_compiled_networks():
    images, labels = images_of_classes(20)
    model = Selecting(True)
    expected = gate_controls(model, [(images, labels)])
    model.compile(backend="eager")
    with torch.no_grad():
        model(images)
    assert gate_controls(model, [(images, labels)]) == expected


def test_mistakes_are_told():
    images, labels = images_of_classes(8)
    kinds = "no kind of gates 'others'; there are another_image, mean, input_free"
    with pytest.raises(ValueError, match=kinds), replaced_gates(Selecting(True), "others"):
        pass
    with pytest.raises(UserError, match="no DGC layers"), replaced_gates(nn.Conv2d(1, 1, 1), "mean"):
        pass
    with pytest.raises(ValueError, match="class numbers"):
        gate_controls(Selecting(True), [images])
    with pytest.raises(ValueError, match="scores"):
        gate_controls(nn.Sequential(Selecting(True), nn.Unflatten(1, (2, 2))), [(images, labels)])
