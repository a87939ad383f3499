"""Which images are meant by files, folders, patterns and lists, and which part of them."""

import io
import os
import sys
from pathlib import Path

import pytest

from dgc_fastai.inference.image_list import Shard, find_images, list_on_stdin
from dgc_fastai.utils.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "in/c.webp", "in/deep/d.jpeg", ".git/e.jpg", "[x].jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


def found(*sources):
    return [str(path) for path in find_images(map(Path, sources))]


def test_files_folders_and_patterns_each_image_once(here):
    assert found(".") == ["[x].jpg", "a.PNG", "b.jpg", "in/c.webp", "in/deep/d.jpeg"]
    assert found("in", "notes.txt", "in/c.webp") == ["in/c.webp", "in/deep/d.jpeg", "notes.txt"]
    assert found("*.jpg") == ["[x].jpg", "b.jpg"]
    assert found("in/**") == ["in/c.webp", "in/deep/d.jpeg"]
    assert found("**/*.jp*g") == ["[x].jpg", "b.jpg", "in/deep/d.jpeg"]
    assert found("[x].jpg") == ["[x].jpg"]  # a file that is there is no pattern
    for source, message in (("x.jpg", "x.jpg: cannot read the image: No such file"), ("*.gif", "no file has a name")):
        with pytest.raises(UserError, match=message):
            found(source)


def test_a_list_on_stdin(monkeypatch):
    content = b"a b.jpg\n\n./a b.jpg\r\nx/\xff.png\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [os.fsencode(path) for path in list_on_stdin()] == [b"a b.jpg", b"x/\xff.png"]


@pytest.mark.parametrize("stdin", [None, b"", b" \n\n"])
def test_no_list_on_stdin(monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(UserError, match="closed" if stdin is None else "list of images on standard input is empty"):
        list_on_stdin()


def test_links_are_followed_but_never_in_a_circle(here):
    os.symlink("..", "in/deep/up")
    os.symlink(here, "in/top")
    os.symlink("in", "again")
    assert found("in") == ["in/c.webp", "in/deep/d.jpeg", "in/top/[x].jpg", "in/top/a.PNG", "in/top/b.jpg"]
    assert found("again") == [name.replace("in/", "again/", 1) for name in found("in")]


def test_a_folder_that_cannot_be_read(here, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path) == "in/deep":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="^in/deep: cannot read the folder: Permission denied$"):
        found("in")


def test_every_image_is_in_one_part_whatever_the_list():
    paths = [Path(f"{number}.jpg") for number in range(1000)]
    parts = [[path for path in paths if Shard(number, 7).has(path)] for number in range(1, 8)]
    assert sorted(path for part in parts for path in part) == sorted(paths) and all(
        100 < len(part) < 190 for part in parts
    )
    assert all(Shard(1, 1).has(path) for path in paths)
    assert Shard.parse("3/8") == Shard(3, 8)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1/", "1.0/2", "²/3"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(UserError, match="use I/N"):
        Shard.parse(text)
