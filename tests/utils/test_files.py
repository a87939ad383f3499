"""Files: whole for whoever reads them, and held by one process at a time."""

import os
import threading

import pytest

from dgc_fastai.utils.errors import WriteError
from dgc_fastai.utils.files import file_lock, remove_partial, write_atomically


def test_a_reader_finds_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([number]) * 3_000_000 for number in range(20)]
    write_atomically(path, contents[0])
    found, done = set(), threading.Event()

    def read():
        while not done.is_set():
            found.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        write_atomically(path, content)
    done.set()
    reader.join()
    assert found <= set(contents) and path.read_bytes() == contents[-1]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteError, match=f"^cannot write {path}: No space left on device; free some space$"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["nowhere/file", "folder"])
def test_where_nothing_can_be_written(tmp_path, place):
    (tmp_path / "folder").mkdir()
    message = f"^cannot write {tmp_path / place}: .*; check that it is there and writable$"
    with pytest.raises(WriteError, match=message):
        write_atomically(tmp_path / place, "new")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("target", ["other", "nowhere"])
def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path, target):
    (tmp_path / "other").write_text("other")
    (tmp_path / "link").symlink_to(target)
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").read_text() == "new" and not (tmp_path / "link").is_symlink()
    assert (tmp_path / "other").read_text() == "other" and len(os.listdir(tmp_path)) == 2


def test_a_file_is_as_readable_as_any_other(tmp_path):
    write_atomically(tmp_path / "ours", "x")
    (tmp_path / "other").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path):
    for name in (".state.pt.abc123.partial", ".hidden", "partial", "run.partial"):
        (tmp_path / name).touch()
    remove_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "partial", "run.partial"]


def test_a_file_is_held_by_one(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with file_lock(path), pytest.raises(BlockingIOError), file_lock(path):
        pass
    with file_lock(path):
        pass
