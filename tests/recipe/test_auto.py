"""Settings that follow the number of pictures."""

import pytest

from dgc_fastai import load_recipe
from dgc_fastai.recipe.auto import IMAGE_ENDINGS, batch_size_for, epochs_for
from dgc_fastai.utils.errors import RecipeError
from helpers import QUICKSTART

RECIPE = """
name: mine
model: {{arch: dgc_densenet22}}
data: {{name: folder, path: '{path}', batch_size: auto}}
train: {{epochs: auto}}
"""


@pytest.fixture
def folder(tmp_path):
    """200 pictures of each of two classes by their names, and files that are none."""
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name / "more").mkdir(parents=True)
        for number in range(200):
            (tmp_path / "pictures" / name / ("more" if number % 2 else "") / f"{number}.JPEG").touch()
        for other in ("notes.txt", "film.gif"):
            (tmp_path / "pictures" / name / other).touch()
    (tmp_path / "pictures" / ".cache").mkdir()
    (tmp_path / "pictures" / ".cache" / "1.png").touch()
    return tmp_path / "pictures"


def load(folder, *overrides):
    path, notes = folder.parent / "mine.yaml", []
    path.write_text(RECIPE.format(path=folder))
    return load_recipe(path, overrides, notes), notes


def test_a_held_out_share_is_not_counted(folder):
    recipe, notes = load(folder)
    assert notes == ["320 training pictures: data.batch_size=32, train.epochs=100"]
    assert (recipe.data.batch_size, recipe.train.epochs) == (32, 100)
    assert load(folder, "data.valid_share=0.75")[1] == ["100 training pictures: data.batch_size=16, train.epochs=143"]


def test_a_validation_folder_is_not_counted(folder):
    for part in ("train", "val"):
        (folder.parent / "split" / part).mkdir(parents=True)
    folder.rename(folder.parent / "split" / "train" / "x")
    split = folder.parent / "split"
    for name in ("cat", "dog"):
        (split / "train" / "x" / name).rename(split / "train" / name)
        (split / "val" / name).mkdir()
        (split / "val" / name / "1.png").touch()
    (split / "train" / "x" / ".cache").rename(split / "train" / ".cache")
    (split / "train" / "x").rmdir()
    assert load(split)[1][0].startswith("400 training pictures")


def test_pictures_behind_a_link_count_as_they_are_read(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for number in range(40):
        (tmp_path / "elsewhere" / f"{number}.webp").touch()
    (folder / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    assert load(folder)[1][0].startswith("352 training pictures")


def test_torchvision_reads_these_endings():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMAGE_ENDINGS) == set(IMG_EXTENSIONS)


def test_a_number_stays(folder):
    recipe, notes = load(folder, "train.epochs=3")
    assert (recipe.data.batch_size, recipe.train.epochs, notes) == (
        32,
        3,
        ["320 training pictures: data.batch_size=32"],
    )
    assert load(folder, "data.batch_size=8")[0].train.epochs == 25


def test_the_run_keeps_the_numbers(folder):
    recipe, _ = load(folder)
    path = folder.parent / "again.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("pictures", [1, 100, 199, 200, 318, 2_000, 20_000, 1_281_167])
def test_there_are_enough_steps(pictures):
    batch_size = batch_size_for(pictures)
    epochs = epochs_for(pictures, batch_size)
    steps = epochs * -(-pictures // batch_size)
    assert 20 <= epochs <= 200
    assert steps >= 1_000 or epochs == 200
    assert steps < 1_100 or epochs == 20 or pictures < 200


def test_without_pictures_the_numbers_are_those_of_2000(tmp_path):
    recipe, notes = load(tmp_path / "nothing")
    assert (recipe.data.batch_size, recipe.train.epochs, notes) == (64, 32, [])


def test_other_data_need_numbers(tmp_path):
    with pytest.raises(RecipeError, match=r"^train.epochs=auto: auto is for data.name=folder; use a number$"):
        load_recipe(QUICKSTART, ["train.epochs=auto"])


@pytest.mark.parametrize("value", ["-3", "big", "[1]", "0.5"])
def test_a_wrong_batch_size_beside_auto_is_the_error(folder, value):
    with pytest.raises(RecipeError, match="data.batch_size"):
        load(folder, f"data.batch_size={value}")
