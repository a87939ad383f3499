"""The three lines of `dgc gates`, from numbers and from networks whose weights are set by hand."""

import pytest
import torch

from dgc_fastai import gate_controls, gate_statistics
from dgc_fastai.analysis.gate_verdict import layer_kind, verdict
from dgc_fastai.layers.dynamic_group_conv import HeadGates
from helpers.selecting import Selecting, images_of_classes


def layer(entropy=0.5, class_share=0.5, inactive=3, **others):
    by_head = {"never_kept": [1, 0], "always_kept": [0, 2]}
    numbers = {"kept_share": 0.25, "overlap_heads": 0.3, "fixed_share": 0.98, "heads": 2, "channels": 4}
    return (
        {"usage_entropy": entropy, "class_share": class_share, "inactive": inactive, "by_head": by_head}
        | numbers
        | others
    )


CLASS, IMAGE, FIXED, OPEN = layer(), layer(class_share=0.01), layer(entropy=0.1), layer(inactive=0)


def controls(mean=0.0, other=0.0, error=0.002):
    one = {"accuracy": 0.9 + mean, "difference": mean, "standard_error": error}
    return {"own": 0.9, "mean": one, "another_image": {**one, "accuracy": 0.9 + other, "difference": other}}


def test_layers_are_named_by_what_they_select_by():
    assert [layer_kind(one) for one in (CLASS, IMAGE, FIXED, OPEN)] == ["class", "image", "fixed", "open"]
    layers = [FIXED, FIXED, FIXED, IMAGE, CLASS, CLASS, OPEN, CLASS]
    assert verdict({"layers": layers})[0] == (
        "Layers 5, 6 and 8 select by class (it explains 50 % of the selection); layer 4 selects by image, whatever its "
        "class; layers 1 to 3 select the same channels for 98 % of the images; layer 7 drops no channels."
    )
    assert verdict({"layers": [layer(class_share=None)]})[0] == "Layer 1 selects by image."
    assert verdict({"layers": [OPEN] * 2})[0] == "Layers 1 and 2 drop no channels."


def test_what_heads_have_in_common_and_what_is_unused():
    line = (
        "Two heads have 30 % of their channels in common (by chance: 25 %); of 16 inputs of all heads, 4 are kept for "
    )
    assert verdict({"layers": [CLASS] * 2})[1] == line + "every image, 2 for none."
    one_head = layer(overlap_heads=None, heads=1, by_head={"never_kept": [1], "always_kept": [0]})
    assert verdict({"layers": [one_head]})[1] == "Of 4 inputs of all heads, 0 are kept for every image, 1 for none."


@pytest.mark.parametrize(
    "mean, error, expected",
    [
        (-0.2, 0.002, "Images need their own gates: top-1 is 90.0 %, with the batch's mean gates 70.0 ± 0.2 %"),
        (-0.006, 0.002, "Images gain little from gates of their own"),
        (-0.004, 0.003, "Images need no gates of their own: top-1"),
        (-0.006, 0.004, "Too few images to tell whether they need gates of their own: top-1"),
        (-0.0005, 0.0001, "Images need no gates of their own"),
        (0.01, 0.001, "Images need no gates of their own"),
    ],
)
def test_whether_it_matters(mean, error, expected):
    line = verdict({"layers": [CLASS], "controls": controls(mean, -0.3, error)})[2]
    assert line.startswith(expected) and "another image's 60.0 ±" in line


def test_networks_set_by_hand():
    images, labels = images_of_classes()
    batches = list(zip(images.split(50), labels.split(50)))

    def lines(select):
        model = Selecting(select)
        return verdict({**gate_statistics(model, batches).to_dict(), "controls": gate_controls(model, batches)})

    first, second, third = lines(True)
    assert first.startswith("Layer 1 selects by class (it explains 9") and third.startswith(
        "Images need their own gates"
    )
    assert "100 % of their channels in common" in second
    first, second, third = lines(False)
    assert first == "Layer 1 selects the same channels for 100 % of the images."
    assert second.endswith("of 64 inputs of all heads, 16 are kept for every image, 48 for none.")
    assert third.startswith("Images need no gates of their own")
    assert verdict(gate_statistics(Selecting(True), [images]).to_dict())[2].startswith(
        "Whether the selection matters is not known"
    )


def test_heads_that_keep_nothing_are_said():
    images, _ = images_of_classes()
    model = Selecting(True)
    gates = next(module for module in model.modules() if isinstance(module, HeadGates))
    with torch.no_grad():
        gates.excite[0].zero_()
        gates.bias[0].fill_(-1)
    first, *_ = verdict(gate_statistics(model, [images]).to_dict())  # one head of several
    assert first.startswith("Layer 1 selects")
    with torch.no_grad():
        gates.excite.zero_()
        gates.bias.fill_(-1)
    first, second, _ = verdict(gate_statistics(model, [images]).to_dict())
    assert first == "Layer 1 keeps nothing." and second.endswith("0 are kept for every image, 64 for none.")
