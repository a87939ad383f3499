"""How the command line was called."""

import sys
from pathlib import Path

import pytest

from dgc_fastai.utils.invocation import display_path, program

CALLS = {
    "clone": ("app.py", "python app.py"),
    "another folder": ("/home/me/clone/app.py", "python /home/me/clone/app.py"),
    "module": ("/env/lib/dgc_fastai/__main__.py", "python -m dgc_fastai"),
    "module, as python shows it": ("-m", "dgc"),
    "installed": ("/env/bin/dgc", "dgc"),
    "notebook": ("/env/lib/ipykernel_launcher.py", "dgc"),
    "another module": ("/env/lib/pytest/__main__.py", "dgc"),
    "interactive": ("", "dgc"),
}


@pytest.mark.parametrize("called, expected", CALLS.values(), ids=CALLS)
def test_the_next_command_is_told_as_this_one_was_called(monkeypatch, called, expected):
    monkeypatch.setattr(sys, "argv", [called, "list"])
    assert program() == expected


def test_paths_below_the_working_folder_are_relative(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert display_path(tmp_path / "a/b") == "a/b"
    assert display_path(Path("a/b")) == "a/b"
    assert display_path(tmp_path.parent / "c") == str(tmp_path.parent / "c")
