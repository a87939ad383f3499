"""What single images select, and the pictures of it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dgc_fastai import gate_statistics
from dgc_fastai.analysis.gate_figures import _selection, draw_classes, draw_images, draw_layers, draw_map
from dgc_fastai.analysis.gate_samples import most_dissimilar, plane_of, sample_gates
from helpers.selecting import Selecting, images_of_classes

STATISTICS = ((0.5,) * 16, (0.25,) * 16)


def batches(own=True, size=20):
    images, labels = images_of_classes(100, own)
    return list(zip(images.split(size), labels.split(size)))


def test_samples_are_the_first_images():
    (images, labels), *_ = batches(size=100)
    samples = sample_gates(Selecting(True), batches(), STATISTICS, most=30)
    assert samples.kept.shape == (30, 64) and samples.shapes == [(4, 16)]
    np.testing.assert_array_equal(samples.labels, labels[:30])
    strong = np.repeat(labels[:30, None].numpy() == np.arange(4), 4, 1)  # the four channels of the class
    np.testing.assert_array_equal(samples.kept.reshape(30, 4, 16), np.repeat(strong[:, None], 4, 1))
    gray = (images[:30] * 0.25 + 0.5).clamp(0, 1).mean(1).mul(255).round()
    np.testing.assert_allclose(samples.pictures, np.repeat(gray[..., None].numpy(), 3, 3), atol=1)


def test_pictures_are_small():
    class OfColors(Selecting):
        def forward(self, x):
            return super().forward(x[:, :1].expand(-1, 16, -1, -1))

    colors = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 200, 130)
    samples = sample_gates(OfColors(True), [(colors, torch.tensor([0, 1]))], ([0.0] * 3, [1.0] * 3))
    assert samples.pictures.shape == (2, 50, 32, 3)
    assert samples.pictures[1, 7, 9].tolist() == [0, 128, 255]


def test_images_that_differ_most():
    kept = np.eye(6, dtype=bool)[[0, 0, 1, 1, 1, 0]]
    kept[3] = [False, False, True, True, True, False]
    kept[5] = [False, False, False, True, True, False]
    assert set(most_dissimilar(kept, 2)) == {0, 3}
    assert set(most_dissimilar(kept, 3)) == {0, 3, 2}
    assert len(most_dissimilar(kept, 10)) == 4, "the others select as one of these does"
    assert len(most_dissimilar(np.ones((5, 3), bool), 6)) == 1


def test_the_map_has_images_together_that_select_alike():
    samples = sample_gates(Selecting(True), batches(), STATISTICS)
    places, shares = plane_of(samples.kept)
    assert places.shape == (100, 2) and 0 < shares[1] <= shares[0] < 1
    for label in range(4):
        own = places[samples.labels == label]
        assert np.ptp(own, 0).max() < 1e-3
    assert plane_of(np.ones((9, 4), bool)) is None and plane_of(np.eye(2, dtype=bool)) is None


def test_colors_of_a_selection():
    usual = np.array([True, False, True, False, True, True])
    kept = np.array([True, True, False, False, True, False])
    picture = _selection(kept, usual, [(2, 2), (1, 2)])
    gray, red, blue, white = [0.7] * 3, [0.8, 0.1, 0.1], [0.13, 0.4, 0.75], [1.0] * 3
    np.testing.assert_allclose(picture, [[gray, red], [blue, white], [gray, blue]])
    assert _selection(kept[:4], usual[:4], [(1, 3), (1, 1)])[1, 1].tolist() == [0.9] * 3, "no such channel"


def opened(png):
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        return picture.size


@pytest.mark.parametrize("classes", [4, 0])
def test_pictures_are_drawn(classes, recwarn):
    names = ["<b>$x$</b>", "a" * 99, "two words", "4"] if classes else None
    data = batches() if classes else [images for images, _ in batches()]
    gates = gate_statistics(Selecting(True), data, names).to_dict()
    samples = sample_gates(Selecting(True), data, STATISTICS)
    for png in (draw_layers(gates, "t"), draw_images(samples, names, "t"), draw_map(samples, names, "t")):
        assert min(opened(png)) > 200
    assert opened(draw_classes(gates, "t")) if classes else draw_classes(gates, "t") is None
    assert not [one for one in recwarn if "matplotlib" in str(one.filename)]


def test_what_nobody_selects_is_not_drawn():
    samples = sample_gates(Selecting(False), batches(), STATISTICS)
    assert draw_images(samples, None, "t") is draw_map(samples, None, "t") is None
