"""Predictions in a file: cut short anywhere, they go on with no line lost and none twice."""

import csv
import json
import multiprocessing
import os
import resource
from pathlib import Path

import pytest

from dgc_fastai.inference.prediction_file import Prediction, PredictionFile
from dgc_fastai.utils.errors import UserError, WriteError

NAMES = ["a.png", 'b,"c".png', "d\n\r\ne.png", "g\rh.png", "ü\u2028.png", os.fsdecode(b"\xff.png"), "f.png"]
PREDICTIONS = [
    Prediction(Path(name), [('cat, "big"', 0.75), ("ünï\ncode", 0.25)], None if name != "f.png" else 'no "image"')
    for name in NAMES
]
PREDICTIONS[-1].classes.clear()


def read(path):
    """What a user would read."""
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        return [
            (one["image"], [(c["class"], c["probability"]) for c in one.get("predictions", [])], one.get("error", ""))
            for one in records
        ]
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = [[(row[f"class_{n}"], row[f"probability_{n}"]) for n in (1, 2) if row[f"class_{n}"]] for row in rows]
    return [(row["image"], [(n, float(p)) for n, p in some], row["error"]) for row, some in zip(rows, pairs)]


EXPECTED = [(str(one.image), one.classes, one.error or "") for one in PREDICTIONS]


def write(path, resume=False):
    with PredictionFile(path, 2, resume) as file:
        left = [one for one in PREDICTIONS if str(one.image) not in file.done]
        file.write(left[:1])
        file.write(left[1:])
    return left


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_cut_short_anywhere_goes_on(tmp_path, suffix):
    whole = tmp_path / f"whole{suffix}"
    write(whole)
    content = whole.read_bytes()
    assert read(whole) == EXPECTED
    for length in range(len(content) + 1):
        part = tmp_path / f"part{suffix}"
        part.write_bytes(content[:length])
        left = write(part, resume=True)
        assert part.read_bytes() == content, length
        # Nothing is computed again, but what the cut went through.
        kept = read_bytes(tmp_path, content[:length], suffix)
        assert len(left) <= len(PREDICTIONS) - sum(one in kept for one in EXPECTED)
    assert write(part, resume=True) == []


def read_bytes(folder, content, suffix):
    path = folder / f"cut{suffix}"
    path.write_bytes(content[: content.rfind(b"\n") + 1])
    try:
        return read(path)
    except (ValueError, KeyError, TypeError):
        return []


def test_predictions_are_there_before_the_end(tmp_path):
    with PredictionFile(tmp_path / "x.jsonl", 2) as file:
        file.write(PREDICTIONS[:2])
        with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(UserError, match="another process is"):
            pool.apply(write, (file.path, True))
        assert read(tmp_path / "x.jsonl") == EXPECTED[:2]  # which gives up the lock of this very process
    with PredictionFile(tmp_path / "x.jsonl", 2, resume=True) as file:  # the lock is gone
        assert file.done == set(NAMES[:2])


HEADER = "image,error,class_1,probability_1,class_2,probability_2\n"
FOREIGN = {
    "text": ("x.csv", "image,label\na,b\n"),
    "other columns": ("x.csv", "image,error,class_1,probability_1\n"),
    "a short row": ("x.csv", f"{HEADER}a,b\n"),
    "text without an end": ("x.csv", "my notes"),
    "notes": ("x.jsonl", "my notes\n"),
    "notes without an end": ("x.jsonl", "my notes"),
    "JSON": ("x.jsonl", "[1]\n"),
    "a long field": ("x.csv", f"{HEADER}{'a' * 200_000},,,,,\n"),
    "deep JSON": ("x.jsonl", "[" * 100_000 + "\n"),
    "other JSON": ("x.jsonl", '{"a": 1}\n'),
    "fewer classes": ("x.jsonl", '{"image": "a", "predictions": [{"class": "b", "probability": 1.0}]}\n'),
}


@pytest.mark.parametrize("name, content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_left_alone(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match="does not hold predictions of 2 classes for each image"):
        write(path, resume=True)
    assert path.read_text() == content
    with pytest.raises(UserError, match="is there already; continue it with --resume"):
        write(path)


@pytest.fixture
def small_disk():
    """Files end at 150 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_full_disk(tmp_path, small_disk, suffix):
    """The rest is tried again when the file is closed, which is no other error."""
    with pytest.raises(WriteError, match="File too large; mend that, then go on with --resume"):
        write(tmp_path / f"x{suffix}")


def test_a_disk_that_is_full_when_the_file_is_closed_or_begun(tmp_path, small_disk):
    with pytest.raises(WriteError, match="File too large"), PredictionFile(tmp_path / "x.jsonl", 2) as file:
        file.file.write("x" * 200)
    with pytest.raises(WriteError, match="File too large"), PredictionFile(tmp_path / "x.csv", 20):
        pass
