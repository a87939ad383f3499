"""What `gate_statistics` counts and measures, beside a plain loop over images, heads and channels."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from dgc_fastai import DynamicGroupConv2d, deploy, gate_statistics
from dgc_fastai.models.gate_counts import GateCounts, watched_gates
from dgc_fastai.models.gate_measures import PER_HEAD
from dgc_fastai.ops import use_backend
from dgc_fastai.utils.errors import UserError
from helpers.networks import network
from helpers.selecting import Selecting, images_of_classes

CLASSES, IMAGES = 5, 41


def batches(images=IMAGES, classes=CLASSES, size=32, batch=8, channels=3):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(classes, (images,), generator=generator)
    pictures = torch.rand(images, channels, size, size, generator=generator) * (1 + labels.view(-1, 1, 1, 1))
    return DataLoader(TensorDataset(pictures, labels), batch)


def half_closed(name="dgc_densenet22", **keywords):
    model = network(name, progress=0.5, **keywords)
    for layer in model.modules():
        if isinstance(layer, DynamicGroupConv2d):
            nn.init.normal_(layer.gates.bias, 0.3, 0.2)  # so that some kept gates are zero
    return model


def plain_loop(model, loader):
    """Each layer's kept gates [images, heads, C], an image at a time, and the labels."""
    layers = [one for one in model.modules() if isinstance(one, DynamicGroupConv2d)]
    seen, labels = [[] for _ in layers], []
    with torch.no_grad(), watched_gates(model) as kept:
        for pictures, classes in loader:
            for one, label in zip(pictures, classes):
                model(one[None])
                for place, gates in enumerate(kept):
                    seen[place].append(gates[0].clone())
                labels.append(int(label))
    return [torch.stack(one).double().numpy() for one in seen], np.array(labels)


def h(p):
    return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def mutual_information(kept, labels):
    """Of a channel, kept or not, and the class, from their joint distribution."""
    total = 0.0
    for value, label in itertools.product((False, True), set(labels)):
        joint = np.mean((kept == value) & (labels == label))
        if joint:
            total += joint * math.log2(joint / np.mean(kept == value) / np.mean(labels == label))
    return total


def overlap(first, second, mean):
    return (first & second).sum() / mean


def measured(gates, labels, most_kept):
    """The measures of one head from its kept gates [images, C]; all but those of other heads and of permuted labels."""
    kept, pairs = gates > 0, list(itertools.permutations(range(len(labels)), 2))
    images, channels = kept.shape
    used = [kept[:, c].mean() for c in range(channels)]
    share, mean = kept.mean(), kept.sum() / images
    information = np.mean([mutual_information(kept[:, c], labels) for c in range(channels)])
    same = [overlap(kept[i], kept[j], mean) for i, j in pairs if labels[i] == labels[j]]
    different = [overlap(kept[i], kept[j], mean) for i, j in pairs if labels[i] != labels[j]]
    popular = sorted(range(channels), key=lambda c: -used[c])[:most_kept]
    return {
        "kept_share": share,
        "usage_entropy": np.mean([h(p) for p in used]) / h(share),
        "fixed_share": kept[:, popular].sum() / kept.sum(),
        "mutual_information": information,
        "overlap_images": np.mean(same + different),
        "overlap_same_class": np.mean(same),
        "overlap_different_class": np.mean(different),
        "gate_mean": gates[kept].mean(),
        "gate_std": gates[kept].std(),
    }


@pytest.mark.parametrize("name", ["dgc_densenet22", "dgc_resnet18"])
def test_statistics_are_those_of_a_plain_loop(name):
    keywords = dict(channels=(8, 8, 16, 16)) if "resnet" in name else dict(stages=(1, 1), growth=(8, 8))
    model, loader = half_closed(name, **keywords), batches()
    seen, labels = plain_loop(model, loader)
    found = gate_statistics(model, loader)
    assert found.images == IMAGES and len(found.layers) == len(seen) >= 2
    for layer, gates in zip(found.layers, seen):
        kept = gates > 0
        counts = layer.counts
        assert kept.any() and not kept.all() and layer.inactive > 0
        by_class = np.stack([kept[labels == label].sum(0) for label in range(CLASSES)])
        np.testing.assert_array_equal(counts.kept, by_class)
        np.testing.assert_array_equal(counts.images, np.bincount(labels, minlength=CLASSES))
        heads, channels = kept.shape[1:]
        together = [[(kept[:, g] & kept[:, h]).sum() for g in range(heads)] for h in range(heads)]
        np.testing.assert_array_equal(counts.together, together)
        for head in range(heads):
            for measure, value in measured(gates[:, head], labels, channels - layer.inactive).items():
                assert layer.measures[measure][head] == pytest.approx(value, rel=1e-5, abs=1e-7), measure
            others = [g for g in range(heads) if g != head]
            shared = [together[head][g] * 2 / (together[head][head] + together[g][g]) for g in others]
            assert layer.measures["overlap_heads"][head] == pytest.approx(np.mean(shared))
        np.testing.assert_allclose(layer.usage, kept.mean(0))


def test_permuted_information_is_that_of_permuted_labels():
    model, loader = half_closed(stages=(1, 1), growth=(8, 8)), batches()
    seen, labels = plain_loop(model, loader)
    rng = np.random.default_rng(5)
    orders = [rng.permutation(labels) for _ in range(40)]
    for layer, gates in zip(gate_statistics(model, loader).layers, seen):
        kept = gates > 0
        values = [
            np.mean([mutual_information(kept[:, head, c], order) for head, c in np.ndindex(kept.shape[1:])])
            for order in orders
        ]
        spread = np.std(values) / len(orders) ** 0.5 + np.std(values) / 5**0.5
        assert abs(layer.mean("mutual_information_permuted") - np.mean(values)) < 4 * spread
        difference = layer.measures["mutual_information"] - layer.measures["mutual_information_permuted"]
        np.testing.assert_allclose(layer.measures["class_information"], difference)


def of(model, images, labels, batch=32):
    return gate_statistics(model, DataLoader(TensorDataset(images, labels), batch)).layers[0]


def test_a_network_that_selects_by_class_is_told_from_others():
    by_class, by_image = images_of_classes(), images_of_classes(own=False)
    selects = of(Selecting(True), *by_class)
    assert selects.mean("class_share") > 0.9 and selects.mean("usage_entropy") > 0.95
    assert selects.mean("overlap_same_class") == 1 and selects.mean("overlap_different_class") == 0
    assert selects.mean("fixed_share") < 0.35
    image_only = of(Selecting(True), *by_image)
    assert abs(image_only.mean("class_share")) < 0.02 and image_only.mean("usage_entropy") > 0.95
    fixed = of(Selecting(False), *by_class)
    assert fixed.mean("usage_entropy") == fixed.mean("class_share") == 0 and fixed.mean("fixed_share") == 1
    assert fixed.mean("overlap_different_class") == fixed.mean("overlap_same_class") == 1
    found = fixed.to_dict()
    assert found["always_kept"] == [0, 4, 8, 12] and len(found["never_kept"]) == 12
    assert found["by_head"]["always_kept"] == [4] * 4 and found["by_head"]["never_kept"] == [12] * 4


def test_what_watches_changes_nothing():
    model, data = half_closed(stages=(1, 1), growth=(8, 8)), list(batches())
    with torch.no_grad():
        expected = model(data[0][0])
        with watched_gates(model):
            assert torch.equal(model(data[0][0]), expected)
    model.train()
    model.stages[0].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    gate_statistics(model, data)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all("gate_observer" not in vars(module) for module in model.modules())


def test_two_can_watch():
    model, (images, _) = Selecting(True), images_of_classes(8)
    with torch.no_grad(), watched_gates(model) as outer:
        with watched_gates(model) as inner:
            model(images)
        assert inner[0] is not None and outer[0] is None
        model(images)
        assert outer[0] is not None
    torch.jit.script(model.layer)
    assert copy.deepcopy(model).layer.gate_observer is None


def test_kernels_of_a_whole_layer_show_their_gates_too():
    pytest.importorskip("triton")
    model, images = Selecting(True), images_of_classes(8)[0]
    noisy = images + torch.rand(images.shape)
    with torch.no_grad(), watched_gates(model) as kept:
        expected_scores, expected = model(noisy), kept[0]
        with use_backend("triton"):
            scores = model(noisy)
        assert kept[0] is not expected
    torch.testing.assert_close(kept[0], expected)
    torch.testing.assert_close(scores, expected_scores)


def test_batches_do_not_matter():
    model = half_closed(stages=(1, 1), growth=(8, 8))
    first, second = (gate_statistics(model, batches(batch=size)) for size in (3, IMAGES))
    for one, two in zip(first.layers, second.layers):
        np.testing.assert_array_equal(one.counts.kept, two.counts.kept)
        np.testing.assert_array_equal(one.counts.together, two.counts.together)
        for name in PER_HEAD:
            np.testing.assert_allclose(one.measures[name], two.measures[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_networks(in_place):
    model, (images, labels) = Selecting(True), images_of_classes(20)
    expected = gate_statistics(model, [(images, labels)]).to_dict()
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with torch.no_grad():
        model(images)  # compiled before anybody looks
    assert gate_statistics(model, [(images, labels)]).to_dict() == expected


def test_memory_does_not_grow_with_the_images():
    """Neither does the time of the end: all that is kept are tables whose sizes do not depend on the images."""
    model, (images, labels) = Selecting(True), images_of_classes(8)

    def live(repeats):
        found = gate_statistics(model, ((images, labels) for _ in range(repeats)))
        layer = found.layers[0].counts
        return found.images, [array.nbytes for array in layer[:-1]]

    assert live(2)[1] == live(60)[1] and live(60)[0] == 480


@pytest.mark.parametrize("labels", [None, "floats", "one score"])
def test_without_classes_what_needs_them_is_not_defined(labels):
    model, (images, numbers) = Selecting(True), images_of_classes(20)
    batch = [images] if labels is None else [images, numbers.float() if labels == "floats" else numbers]
    if labels == "one score":
        model = nn.Sequential(model, nn.Linear(4, 1))
    found = gate_statistics(model, [batch]).to_dict()
    assert found["classes"] is found["accuracy"] is found["images_per_class"] is None and found["images"] == 20
    layer = found["layers"][0]
    assert {name for name in PER_HEAD if layer[name] is None} == {
        "mutual_information", "mutual_information_permuted", "class_information", "class_share",
        "overlap_same_class", "overlap_different_class",
    }  # fmt: skip
    assert layer["usage_by_class"] is None and len(layer["usage"]) == 4


def test_images_of_one_class_and_one_image():
    model, (images, labels) = Selecting(True), images_of_classes(20)
    one_class = of(model, images, torch.zeros_like(labels)).to_dict()
    assert one_class["class_information"] == 0 and one_class["overlap_different_class"] is None
    single = of(model, images[:1], labels[:1]).to_dict()
    assert single["overlap_images"] is None and single["usage_entropy"] == 0


def test_names_of_the_classes():
    model, (images, labels) = Selecting(True), images_of_classes(20)
    loader = DataLoader(TensorDataset(images, labels), 8)
    assert gate_statistics(model, loader).classes == ["0", "1", "2", "3"]
    loader.dataset.classes = list("abcd")
    assert gate_statistics(model, loader).classes == list("abcd")
    loader.dataset.classes = list("abc")  # not those of this network
    assert gate_statistics(model, loader).classes == ["0", "1", "2", "3"]
    assert gate_statistics(model, loader, "wxyz").classes == list("wxyz")
    assert gate_statistics(model, loader).accuracy == 1


def test_mistakes_are_told():
    model, (images, labels) = Selecting(True), images_of_classes(20)
    for wrong, kind, message in (
        ([], ValueError, "no images"),
        ([(images, labels + 1)], ValueError, "labels are none of the 4 classes"),
        ([(images, labels - 1)], ValueError, "labels are none of the 4 classes"),
        ([{"image": images}], TypeError, "a batch has to be images"),
        ([(images, labels), images], ValueError, "others have none"),
    ):
        with pytest.raises(kind, match=message):
            gate_statistics(model, wrong)
    with pytest.raises(ValueError, match="3 names for the network's 4 classes"):
        gate_statistics(model, [(images, labels)], "abc")
    for without in (nn.Conv2d(16, 4, 1), deploy(half_closed(stages=(1, 1), growth=(8, 8)))):
        with pytest.raises(UserError, match="no DGC layers"):
            gate_statistics(without, [(images, labels)])
    runs = iter([True, False])
    sometimes = nn.ModuleDict({"one": model, "two": Selecting(True)})
    sometimes.forward = lambda x: model(x) + (sometimes["two"](x) if next(runs) else 0)
    with pytest.raises(ValueError, match=r"two.layer did not run"):
        gate_statistics(sometimes, [(images, labels)] * 2)
    unused = nn.ModuleDict({"used": model, "unused": Selecting(True)})
    unused.forward = lambda x: model(x)
    with pytest.raises(ValueError, match=r"unused.layer did not run"):
        gate_statistics(unused, [(images, labels)])
    crops = nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(0, 1), model)
    crops.forward = lambda x: model(x.repeat(2, 1, 1, 1))[: len(x)]
    with pytest.raises(ValueError, match="with 40 samples for 20 images"):
        gate_statistics(crops, [(images, labels)])


def test_large_tables_by_class_are_left_out(monkeypatch):
    model, (images, labels) = Selecting(True), images_of_classes(20)
    found = gate_statistics(model, [(images, labels)])
    assert len(found.to_dict()["layers"][0]["usage_by_class"]) == 4
    monkeypatch.setattr("dgc_fastai.models.gate_statistics.MAX_NUMBERS", 100)
    assert found.to_dict()["layers"][0]["usage_by_class"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_nothing_waits_for_the_device_within_a_batch():
    """Counted operators of a batch, of which none reads a number back."""
    model, (images, labels) = Selecting(True), images_of_classes(20)
    counts = GateCounts([model.layer], 4, torch.device("cpu"))
    with torch.no_grad(), watched_gates(model) as kept:
        model(images)
    with Operators() as operators:
        counts.add(kept, labels)
    assert not {"_local_scalar_dense", "nonzero", "item"} & set(operators.names)
    assert len(operators.names) < 45


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))
