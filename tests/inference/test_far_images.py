"""Images far from everything that a network was trained on: it stays finite, and computes the same in every form."""

import pytest
import torch
import torch.nn.functional as F

from dgc_fastai import deploy
from dgc_fastai.inference.export import export
from dgc_fastai.inference.predict import Predictor
from helpers.runs import SMALL, start


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """A network trained for some epochs, with its gates closed."""
    overrides = [*SMALL, "train.epochs=8", "data.batch_size=64", f"output={tmp_path_factory.mktemp('runs')}"]
    folder, _ = start(overrides)
    return Predictor.from_weights(folder / "last.safetensors")


@pytest.fixture(scope="module")
def images(predictor):
    """1,000 images: noise, one color, black and white, four colors, a few dots; half of them far beyond [0, 1]."""
    generator = torch.Generator().manual_seed(0)

    def draw(side):
        return torch.rand(200, 1, side, side, generator=generator)

    noise, colors, dots = draw(8), draw(1), draw(8)
    kinds = (
        noise,
        colors.expand(-1, -1, 8, 8),
        (noise > 0.5).float(),
        F.interpolate(draw(2), (8, 8)),
        (dots < 0.02).float(),
    )
    images = torch.cat(kinds)
    images[::2] = 5 - 10 * images[::2]
    mean, std = predictor.recipe.data.statistics
    return (images - mean[0]) / std[0]


def same(ours, theirs):
    assert ours.isfinite().all() and theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_deployed(predictor, images):
    with torch.no_grad():
        same(deploy(predictor.model)(images), predictor.model(images))


def test_exported_to_onnx(predictor, images, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    export(predictor, tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])

    with torch.no_grad():
        same(torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), predictor.model(images))
