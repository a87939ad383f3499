"""Small data sets in the formats of the real ones."""

import gzip
import pickle

import numpy as np
from PIL import Image

from dgc_fastai.recipe.schema import Data


def write_cifar(folder, name, binary=False, n=40):
    """CIFAR's layout with random images: image i is mostly of value i, so that it can be told."""
    rng = np.random.default_rng(0)
    fine = 100 if name == "cifar100" else 10

    def part(count):
        images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return images, rng.integers(0, fine, count)

    folder = (
        folder
        / {
            ("cifar10", False): "cifar-10-batches-py",
            ("cifar10", True): "cifar-10-batches-bin",
            ("cifar100", False): "cifar-100-python",
            ("cifar100", True): "cifar-100-binary",
        }[name, binary]
    )
    folder.mkdir(parents=True)
    names = [f"class{i}" for i in range(fine)]
    trains = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    test = "test_batch" if name == "cifar10" else "test"
    key, meta = ("labels", "batches.meta") if name == "cifar10" else ("fine_labels", "meta")
    content = {}
    for file in [*trains, test]:
        images, labels = content[file] = part(n if file == test else n // len(trains))
        if binary:
            coarse = [] if name == "cifar10" else [np.zeros((len(labels), 1), np.uint8)]
            rows = np.concatenate([*coarse, labels[:, None].astype(np.uint8), images], 1)
            (folder / f"{file}.bin").write_bytes(rows.tobytes())
        else:
            batch = {"data": images, key: labels.tolist(), "filenames": ["x.png"] * len(labels)}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    if binary:
        meta = "batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"
        (folder / meta).write_text("\n".join(names) + "\n\n")
    else:
        label_names = {"label_names" if name == "cifar10" else "fine_label_names": names}
        (folder / meta).write_bytes(pickle.dumps(label_names, protocol=2))
    return folder, content, test


def write_imagenet(folder, classes=("n01", "n02", "n03"), train=4, valid=2):
    """ImageNet's layout with small JPEGs; a class is a color."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", valid)):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (60 + i, 80, 3), dtype=np.uint8)
                pixels[..., number % 3] += 150
                Image.fromarray(pixels).save(folder / part / name / f"{name}_{i}.JPEG")
    return folder


def write_fashion_mnist(folder, packed=False, n=30):
    """Fashion-MNIST's four idx files with random images, and what is in them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for part in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
        content[part] = images, labels
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            path = folder / f"{part}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(head + values.tobytes()))
            else:
                path.write_bytes(head + values.tobytes())
    return content


def folder_data(path, **kwargs):
    """The data section of a recipe for a folder of pictures."""
    return Data(name="folder", path=str(path), **{"size": 16, "batch_size": 4, **kwargs})
