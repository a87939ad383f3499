"""Predictions as text: JSON lines or CSV, written as they come, and continued where a process has stopped.

Imports no torch.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.errors import UserError, WriteError
from ..utils.files import lock_without_children

__all__ = ["Prediction", "PredictionFile", "as_json"]


class Prediction(NamedTuple):
    """What a network says of an image file.

    Attributes:
        image: its path.
        classes: class names and their probabilities in [0, 1], the likeliest first.
        error: why there are no classes: the file cannot be read, or the network's output is NaN or Inf.
    """

    image: Path
    classes: list[tuple[str, float]]
    error: str | None = None


def as_json(prediction: Prediction, only_ascii: bool = False) -> str:
    """One line, without its end. A file name that is not UTF-8 is written with escapes that Python's `json` reads.

    Args:
        only_ascii: use escapes for all but ASCII.
    """
    image, classes, error = prediction
    record: dict[str, Any] = {"image": str(image)}
    if error is None:
        record["predictions"] = [{"class": name, "probability": round(share, 6)} for name, share in classes]
    else:
        record["error"] = error
    text = json.dumps(record, ensure_ascii=only_ascii)
    return text if _is_unicode(text) else json.dumps(record)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class PredictionFile:
    """A file that grows by predictions; a context manager that holds a lock on it.

    Args:
        path: .jsonl for JSON lines, .csv for a table.
        top: number of classes for each image.
        resume: continue a file that is there. A last line that is cut short is removed.

    Attributes:
        done: names of the images that it has already.

    Raises:
        UserError: the ending is another one; the file is there, and not to be continued, not one of these, or being
            written by another process.
        WriteError: it cannot be written.
    """

    def __init__(self, path: Path, top: int, resume: bool = False):
        if path.suffix not in (".jsonl", ".csv"):
            raise UserError(f"--out {path}: use a name that ends in .jsonl or .csv")
        if not path.absolute().parent.is_dir():
            raise UserError(f"--out {path}: there is no folder {path.absolute().parent}")
        if path.exists() and not resume:
            raise UserError(f"--out {path}: is there already; continue it with --resume, or use another name")
        self.path, self.top, self.done = path, top, set[str]()
        self.header = ["image", "error"]
        self.header += [f"{part}_{number}" for number in range(1, top + 1) for part in ("class", "probability")]

    def __enter__(self) -> "PredictionFile":
        with ExitStack() as stack:
            try:
                self.file = open(self.path, "a+", encoding="utf-8", errors="surrogateescape", newline="")
                stack.push(self)
                lock_without_children(self.file)
                self._continue()
            except BlockingIOError:
                raise UserError(f"--out {self.path}: another process is writing it") from None
            except OSError as error:
                raise self._not_written(error) from None
            stack.pop_all()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        try:
            self.file.close()
        except OSError as unwritten:  # the rest, once more
            if kind is None:
                raise self._not_written(unwritten) from None

    def write(self, predictions: Iterable[Prediction]) -> None:
        """Append predictions. They are in the file, for every other process, when this returns.

        Raises:
            WriteError: the disk is full.
        """
        text = "".join(map(self._line, predictions))
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as error:
            raise self._not_written(error) from None

    def _line(self, prediction: Prediction) -> str:
        if self.path.suffix == ".jsonl":
            return as_json(prediction) + "\n"
        pairs = [value for name, share in prediction.classes for value in (name, f"{share:.6f}")]
        row = [str(prediction.image), prediction.error or "", *pairs]
        return _csv_line(row + [""] * (len(self.header) - len(row)))

    def _continue(self) -> None:
        """Find out what the file has, and remove a last line that is cut short."""
        is_table, start = self.path.suffix == ".csv", _csv_line(self.header)
        self.file.seek(0)
        whole, tail = 0, ""  # bytes; what follows them
        for record in _records(self.file, is_table):
            if not record.endswith("\n"):
                tail = record
            elif is_table and not whole:
                if record != start:
                    raise self._foreign()
            else:
                self.done.add(self._image(record))
            whole += 0 if tail else len(record.encode("utf-8", "surrogateescape"))
        if tail and not whole and not (start if is_table else '{"image": "').startswith(tail[:11]):
            raise self._foreign()
        if tail:
            self.file.truncate(whole)
        if not whole and is_table:
            self.file.write(start)
            self.file.flush()

    def _image(self, line: str) -> str:
        try:
            if self.path.suffix == ".csv":
                (row,) = csv.reader(io.StringIO(line, newline=""))
                if len(row) != len(self.header):
                    raise ValueError(line)
                return row[0]
            record = json.loads(line)
            if len(record.get("predictions", range(self.top))) != self.top:
                raise self._foreign()
            return str(Path(record["image"]))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, csv.Error) as error:
            raise error if isinstance(error, UserError) else self._foreign() from None

    def _not_written(self, error: OSError) -> WriteError:
        reason = f"{error.strerror}; mend that, then go on with --resume"
        return WriteError(f"--out {self.path}: cannot write it: {reason}")

    def _foreign(self) -> UserError:
        what = f"predictions of {self.top} classes for each image"
        return UserError(f"--out {self.path}: is there, and does not hold {what}; use another name")


def _csv_line(row: list[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(row)  # quotes names with either
    return text.getvalue().removesuffix("\r\n") + "\n"


def _records(lines: Iterable[str], quoted: bool) -> Iterator[str]:
    """Lines; in CSV, one that ends within quotes goes on in the next. The last one may be cut short."""
    record = ""
    for line in lines:
        record += line
        if record.endswith("\n") and not (quoted and record.count('"') % 2):
            yield record
            record = ""
    if record:
        yield record.rstrip("\n") or " "
