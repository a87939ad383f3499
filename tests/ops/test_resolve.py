"""What a recipe leaves to the device. What CUDA says of a GPU is replaced, so that every machine tests it."""

import pytest
import torch

from dgc_fastai import load_recipe
from dgc_fastai.ops.device import resolve, select_channels_last, select_precision
from dgc_fastai.utils.errors import RecipeError
from helpers import QUICKSTART, ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes every GPU one of a compute capability."""

    def choose(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        # A V100 computes a bf16 tensor, too, only slowly.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)

    return choose


@pytest.mark.parametrize(
    "capability, precision",
    [((6, 1), "float32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_auto_is_what_the_gpu_computes_fast(gpu, capability, precision):
    gpu(*capability)
    assert select_precision("auto", GPU) == precision
    assert select_precision("float32", GPU) == "float32" and select_precision("fp16", GPU) == "fp16"


def test_auto_is_float32_and_channels_first_on_a_cpu():
    assert select_precision("auto", CPU) == select_precision("auto", torch.device("mps")) == "float32"
    assert select_precision("bf16", CPU) == "bf16"
    assert not select_channels_last(None, CPU) and select_channels_last(True, CPU)
    assert select_channels_last(None, GPU) and not select_channels_last(False, GPU)


def test_what_a_device_does_not_compute_in_is_refused(gpu):
    gpu(7, 0)
    with pytest.raises(RecipeError, match="Some GPU has no bf16 units .compute capability 7.0; .* use fp16 or float32"):
        select_precision("bf16", GPU)
    gpu(6, 1)
    with pytest.raises(RecipeError, match="; use float32$"):
        select_precision("bf16", GPU)
    with pytest.raises(RecipeError, match="fp16 needs a CUDA device"):
        select_precision("fp16", CPU)


def test_a_recipe_is_resolved_once_and_only_where_it_leaves_a_choice(gpu):
    gpu(8, 0)
    recipe = load_recipe(QUICKSTART)
    assert (recipe.train.precision, recipe.train.channels_last) == ("auto", None)
    on_gpu = resolve(recipe, GPU)
    assert (on_gpu.train.precision, on_gpu.train.channels_last) == ("bf16", True)
    assert resolve(on_gpu, CPU) == on_gpu  # a resumed run keeps them
    assert load_recipe(QUICKSTART, ["train.precision=bf16", "train.channels_last=true"]) == on_gpu
    exact = resolve(load_recipe(QUICKSTART, ["train.precision=float32", "train.channels_last=false"]), GPU)
    assert (exact.train.precision, exact.train.channels_last) == ("float32", False)


def test_recipes_of_published_numbers_say_what_the_authors_used():
    for path in (ROOT / "recipes").glob("*.yaml"):
        published = "(published)" in path.read_text()
        assert load_recipe(path).train.precision == ("float32" if published else "auto"), path
