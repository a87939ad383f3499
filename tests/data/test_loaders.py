"""What all data sets have in common."""

import pytest
import torch
from PIL import Image

from dgc_fastai import build_learner, load_recipe
from dgc_fastai.data.image_files import ImageReader
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.recipe.schema import Data
from helpers import QUICKSTART
from helpers.datasets import write_cifar, write_fashion_mnist, write_imagenet

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "cifar100", "imagenet", "folder"])
def test_batches_can_be_shown(tmp_path, name):
    import matplotlib

    matplotlib.use("Agg")
    if name.startswith("cifar"):
        write_cifar(tmp_path, name)
    elif name == "fashion_mnist":
        write_fashion_mnist(tmp_path)
    elif name != "digits":
        write_imagenet(tmp_path)
    path = None if name == "digits" else str(tmp_path)
    where = "data.path=null" if path is None else f"data.path={path}"
    small = "data.size=32", "data.batch_size=6", "model.stages=[1,1,1]"
    recipe = load_recipe(QUICKSTART, [f"data.name={name}", where, *small])
    learn = build_learner(recipe)
    learn.dls.show_batch(max_n=4)
    titles = [axes.get_title() for axes in matplotlib.pyplot.gcf().axes]
    assert len(titles) == 4 and set(titles) <= set(learn.dls.vocab)
    matplotlib.pyplot.close("all")
    with learn.no_bar():
        learn.show_results(max_n=4)
    titles = [axes.get_title() for axes in matplotlib.pyplot.gcf().axes]
    assert len(titles) == 4 and all(set(title.split("\n")) <= set(learn.dls.vocab) for title in titles)
    matplotlib.pyplot.close("all")
    # And a learner can be taken elsewhere, as every learner of fastai.
    learn.export(tmp_path / "learner.pkl")
    from fastai.learner import load_learner

    assert list(load_learner(tmp_path / "learner.pkl").dls.vocab) == list(learn.dls.vocab)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "folder"])
def test_an_image_file_is_seen_as_in_validation(tmp_path, name):
    path = {"path": None if name == "digits" else str(tmp_path / "data")}
    if name == "folder":
        write_imagenet(tmp_path / "data")
        data = Data(name=name, **path, size=32)
        dls = build_dataloaders(data, CPU)
        file = dls.valid_ds.items[0]
    else:
        if name == "cifar10":
            write_cifar(tmp_path / "data", name)
        elif name == "fashion_mnist":
            write_fashion_mnist(tmp_path / "data")
        data = Data(name=name, **path)
        dls = build_dataloaders(data, CPU)
        file = tmp_path / "0.png"
        image = dls.valid_ds.images[0]
        Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()).save(file)
    expected = dls.valid.one_batch()[0][0]
    reader = ImageReader(data)
    torch.testing.assert_close(reader.normalize(reader(file)), expected.as_subclass(torch.Tensor))
