"""A run's weights as a network that classifies image files."""

import json
import os
import signal

import pytest
from PIL import Image

from dgc_fastai import CheckpointError, load_recipe, save_checkpoint
from dgc_fastai.inference import predict
from dgc_fastai.inference.predict import Predictor
from dgc_fastai.models.factory import build_model
from dgc_fastai.utils.errors import UserError
from helpers import QUICKSTART

CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with weights that nobody has trained."""
    folder = tmp_path_factory.mktemp("run")
    model = build_model(load_recipe(QUICKSTART).model, 10, (1, 8, 8))
    metadata = {"recipe": QUICKSTART.read_text(), "classes": json.dumps(CLASSES)}
    save_checkpoint(model, folder / "best.safetensors", metadata)
    Image.new("L", (8, 8), 128).save(folder / "image.png")
    return folder


@pytest.mark.parametrize("name", ["best.safetensors", ""], ids=["a file", "a run folder"])
def test_weights_say_which_network_they_belong_to(run, name):
    predictor = Predictor.from_weights(str(run / name))
    assert predictor.classes == CLASSES and predictor.recipe.name == "quickstart" and not predictor.model.training
    first, second = predictor.predict([run / "image.png"] * 2, batch_size=1)
    assert first == second and sorted(name for name, _ in first) == CLASSES
    shares = [share for _, share in first]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="best.safetensors: cannot tell its network: no such file"):
        Predictor.from_weights(tmp_path)


def test_a_dead_reader_of_images_is_one_line(run, monkeypatch):
    def killed(files, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(predict._Files, "__getitem__", killed)
    found = Predictor.from_weights(run).predict_files([run / "image.png"], top=1, workers=1)
    with pytest.raises(UserError, match="a process that reads images has died, possibly for lack of memory"):
        list(found)
