"""Every way in which an image file can be damaged, and files that only look odd."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dgc_fastai.data import image_files
from dgc_fastai.data.image_files import open_image
from dgc_fastai.data.loaders import build_dataloaders
from dgc_fastai.utils.errors import RecipeError
from helpers.datasets import folder_data, write_imagenet

CPU = torch.device("cpu")


def encoded(kind, mode="RGB", **options):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).convert(mode)
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def png(width, height, pixels=b"", depth=8, color=2):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def cut(content, share):
    return content[: int(len(content) * share)]


def zeroed(content, start, stop):
    start, stop = (int(len(content) * share) for share in (start, stop))
    return content[:start] + bytes(stop - start) + content[stop:]


def huge(content):
    """A JPEG whose head claims 65,000 x 65,000 pixels."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", 65000, 65000) + content[place + 4 :]


def corrupt_files():
    jpeg, progressive, crc = encoded("JPEG"), encoded("JPEG", progressive=True), bytearray(encoded("PNG"))
    crc[60] ^= 255
    return {
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "magic_only.jpg": jpeg[:3],
        "head_only.jpg": jpeg[: jpeg.index(b"\xff\xda")],
        "cut_early.jpg": cut(jpeg, 0.1),
        "cut_half.jpg": cut(jpeg, 0.5),
        "cut_late.jpg": cut(jpeg, 0.95),
        "last_byte_gone.jpg": jpeg[:-1],
        "progressive_cut.jpg": cut(progressive, 0.7),
        "head_zeroed.jpg": zeroed(jpeg, 0, 0.1),
        "wrong_magic.jpg": b"XY" + jpeg[2:],
        "huge.jpg": huge(jpeg),
        "text.jpg": b"no image at all",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "zeros.jpg": bytes(5000),
        "crc.png": bytes(crc),
        "cut.png": cut(encoded("PNG"), 0.5),
        "middle_zeroed.png": zeroed(encoded("PNG"), 0.4, 0.6),
        "no_pixels.png": png(10, 10),
        "zero_by_zero.png": png(0, 0),
        "bomb.png": png(60000, 60000),
        "line.png": png(60000, 1, b"\0" + bytes(180000)),
        "cut_gif.jpg": cut(encoded("GIF", "P"), 0.5),
        "cut.webp": cut(encoded("WEBP"), 0.5),
        "cut.bmp": cut(encoded("BMP"), 0.5),
        "cut.tiff": cut(encoded("TIFF"), 0.5),
        "cut.ppm": cut(encoded("PPM"), 0.5),
    }


def odd_files():
    """Files that are not damaged, if rarely seen."""
    noise = np.random.default_rng(1).integers(0, 2**16, (60, 80))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise)
    return {
        "cmyk.jpg": encoded("JPEG", "CMYK"),
        "grey.jpg": encoded("JPEG", "L"),
        "progressive.jpg": encoded("JPEG", progressive=True),
        "a_png.jpg": encoded("PNG"),
        "palette.png": encoded("PNG", "P"),
        "transparent_palette.png": encoded("PNG", "P", transparency=0),
        "grey_alpha.png": encoded("PNG", "LA"),
        "alpha.png": encoded("PNG", "RGBA"),
        "two_colours.png": encoded("PNG", "1"),
        "deep.png": png(80, 60, rows, depth=16, color=0),
        "one_pixel.png": png(1, 1, b"\0\1\2\3"),
        "a_gif.jpg": encoded("GIF", "P"),
        "plain.webp": encoded("WEBP"),
        "plain.bmp": encoded("BMP"),
        "plain.tiff": encoded("TIFF"),
        "plain.ppm": encoded("PPM"),
    }


def write_odd_and_corrupt(folder):
    """Both as training images of ImageNet's layout, with a link to nowhere; the paths of those that are bad."""
    write_imagenet(folder, train=2)
    for name, content in (odd_files() | corrupt_files()).items():
        (folder / "train/n01" / name).write_bytes(content)
    (folder / "train/n02/nowhere.jpg").symlink_to(folder / "gone.jpg")
    (folder / "train/n03/folder.jpg").mkdir()  # not listed, since no file
    return [folder / "train/n01" / name for name in corrupt_files()] + [folder / "train/n02/nowhere.jpg"]


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2], ids="workers={}".format)
@pytest.mark.parametrize("resizing", [(), ("cpu",)], ids=["by workers", "by device"])
def test_of_many_kinds_of_corrupt_images_each_is_named_and_no_other_lost(
    tmp_path, workers, resizing, caplog, capfd, monkeypatch
):
    monkeypatch.setattr(image_files, "RESIZING_DEVICES", resizing)
    bad = write_odd_and_corrupt(tmp_path)
    assert len(bad) >= 20
    dl = build_dataloaders(folder_data(tmp_path, workers=workers, unreadable="skip", batch_size=50), CPU).train
    with caplog.at_level(logging.WARNING):
        images, labels = map(torch.cat, zip(*dl))
        list(dl)
    assert len(images) == len(labels) == 6 + len(odd_files()) and images.isfinite().all()
    told = [record.getMessage() for record in caplog.records if record.name == "dgc_fastai.data.image_files"]
    assert sorted(line.split(": ")[0] for line in told) == sorted(
        f"skipped the unreadable image {path}" for path in bad
    )
    assert all("\n" not in line and len(line) - len(str(tmp_path)) < 250 for line in told)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_each_kind_of_corrupt_image_stops_the_run_with_one_line(tmp_path):
    write_imagenet(tmp_path, classes=("cat", "dog"), train=1)
    kinds = corrupt_files()
    for number, (name, content) in enumerate(kinds.items()):
        path = tmp_path / "train/cat" / name
        path.write_bytes(content)
        workers = 2 if number % 13 == 0 else 0
        with pytest.raises(RecipeError) as error:
            list(build_dataloaders(folder_data(tmp_path, workers=workers), CPU).train)
        line = str(error.value)
        assert line.startswith(f"data.path: cannot read the image {path}: ") and "\n" not in line
        assert line.count(str(path)) == 1 and line.endswith("mend or remove it, or set data.unreadable=skip")
        path.unlink()
    assert sum(len(x) for x, _ in build_dataloaders(folder_data(tmp_path), CPU).train) == 2


def test_odd_images_are_seen_as_they_are(tmp_path):
    expected = np.asarray(Image.open(io.BytesIO(encoded("PNG"))).convert("L"), float)
    for name, content in odd_files().items():
        (path := tmp_path / name).write_bytes(content)
        image = open_image(path)
        assert image.mode == "RGB" and type(image).__name__ == "PILImage", name
        if name == "deep.png":
            with Image.open(path) as deep:
                expected_deep = np.asarray(deep).astype(int) // 256
            assert (np.asarray(image)[..., 0] == expected_deep).all() and 100 < expected_deep.mean() < 155
        elif name not in ("one_pixel.png", "two_colours.png"):
            grey = np.asarray(image.convert("L"), float)
            assert np.corrcoef(grey.ravel(), expected.ravel())[0, 1] > 0.6, name
