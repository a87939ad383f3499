"""The command line, called as a person calls it."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT

TINY = "model.stages=[1,1,1]", "model.growth=[4,4,4]", "data.size=8", "log.report=false"


def process(*arguments, cwd=ROOT, expect=0, **environment):
    """What a process of its own prints; for what in-process calls cannot show, as torch takes its time to start."""
    command = [sys.executable, str(ROOT / "app.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if expect == 0 else done.stderr


@pytest.fixture
def app(monkeypatch, capsys):
    """The command line without the process."""
    from dgc_fastai.cli import main as module

    def call(*arguments, cwd=ROOT, expect=0):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, arguments)])
        capsys.readouterr()
        code = module.main()
        output, errors = capsys.readouterr()
        if expect is None:
            return code, output if code == 0 else errors
        assert code == expect, output + errors
        return output if expect == 0 else errors

    return call


def only(folder):
    (path,) = folder.iterdir()
    return path
