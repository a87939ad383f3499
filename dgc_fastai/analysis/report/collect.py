"""Run folders -> what they hold, however much of it there is. Imports no torch."""

import csv
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...recipe.loading import load_recipe
from ...recipe.schema import Recipe
from ...utils.errors import RecipeError, UserError
from ...utils.files import file_lock
from ...utils.invocation import program
from ...utils.text import one_line

__all__ = ["StoredRun", "find_runs", "read_stored_run", "unstarted_runs"]

MAX_DEPTH = 3  # folders between the one that is given and a run's
MAX_BYTES = 50 * 2**20  # of a file of a run: far beyond any of ours


@dataclass
class StoredRun:
    """What the folder of a run holds.

    Attributes:
        recipe: None if this version cannot read it.
        recipe_text: as it is in the folder.
        summary: of `summary.json`, empty if it is missing or damaged.
        history: a row of numbers for each epoch; None for NaN, Inf and what is not a number.
        gates: of `gates.json`, or None.
        state: "finished", "running", "interrupted", or "stopped" if it ended before its last epoch and left no state.
        missing: a sentence for each thing that a report lacks.
    """

    folder: Path
    recipe: Recipe | None = None
    recipe_text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float | None]] = field(default_factory=list)
    gates: dict[str, Any] | None = None
    state: str = "finished"
    missing: list[str] = field(default_factory=list)

    @property
    def weights(self) -> Path | None:
        """The file of the best weights, if there is one."""
        path = self.folder / "best.safetensors"
        return path if path.is_file() else None

    @property
    def epochs(self) -> tuple[int, int | None]:
        """Finished epochs, and those of the recipe."""
        done = self.summary.get("epochs", len(self.history))
        return done, self.recipe.train.epochs if self.recipe else None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders among some folders and below them, each once, in the order of the paths and then of their names.

    Raises:
        UserError: a folder does not exist, or there is no run in it.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            what = "is a file; name the folder of its run" if path.exists() else "there is no such folder"
            raise UserError(f"{path}: {what}")
        inside = list(_runs_in(path, MAX_DEPTH))
        if not inside:
            raise UserError(f"{path}: there is no run in it: no folder with a recipe.yaml")
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "recipe.yaml").is_file():
        yield folder
    elif depth:
        for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
            with suppress(PermissionError):
                yield from _runs_in(inside, depth - 1)


def unstarted_runs(folder: Path) -> list[str]:
    """The names of a sweep's runs that have no folder yet."""
    planned = (path.stem for path in sorted((folder / "plan").glob("*.yaml")))
    return [name for name in planned if not any(folder.glob(f"{name}-*/recipe.yaml"))]


def read_stored_run(folder: Path) -> StoredRun:
    """What is in the folder of a run. What is missing or damaged is said in `missing`, and raises nothing."""
    run = StoredRun(folder)
    _read_recipe(run)
    _read_summary(run)
    _read_history(run)
    _read_gates(run)
    run.state = _state(run)
    done, planned = run.epochs
    if run.state in ("interrupted", "stopped"):
        begin = f"The run ended after {_count(done, 'epoch')}" + (f" of {planned}" if planned else "")
        command = f"{program()} {shlex.quote(str(folder / 'recipe.yaml'))} --resume"
        resume = f"; to go on: {command}" if run.state == "interrupted" else ""
        run.missing.insert(0, f"{begin}{resume}.")
    elif run.state == "running":
        run.missing.insert(0, f"The run is still going on: {_count(done, 'epoch')} of {planned} are done.")
    if not run.weights:
        run.missing.append("There is no best.safetensors, so nothing was evaluated or timed.")
    if run.summary and not run.summary.get("environment"):
        text = "Command, versions, commit and machine: the run is of a version that did not keep them."
        run.missing.append(text)
    return run


def _read_recipe(run: StoredRun) -> None:
    path = run.folder / "recipe.yaml"
    with suppress(OSError):
        run.recipe_text = path.read_text(encoding="utf-8", errors="replace")[:MAX_BYTES]
    try:
        run.recipe = load_recipe(path)
    except RecipeError as error:
        run.missing.append(f"This version cannot read the recipe: {error}")


def _read_summary(run: StoredRun) -> None:
    try:
        summary = _read_json(run.folder / "summary.json")
        if not isinstance(summary.get("best", {}), dict) or not isinstance(summary.get("epochs", 0), int):
            raise ValueError("not the summary of a run")
        run.summary = summary
    except FileNotFoundError:
        run.missing.append("No epoch was finished, so there is no accuracy and no cost.")
    except (OSError, ValueError) as error:
        run.missing.append(f"summary.json cannot be read: {one_line(error)}")


def _read_history(run: StoredRun) -> None:
    try:
        with open(run.folder / "history.csv", newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        run.missing.append("There is no history.csv, so there are no training curves.")
        return
    except (OSError, csv.Error) as error:
        run.missing.append(f"history.csv cannot be read: {one_line(error)}")
        return
    run.history = [{key: _number(value) for key, value in row.items() if key} for row in rows]
    for row in run.history:
        if "gate_penalty" not in row and "lasso" in row:  # of an earlier version
            row["gate_penalty"] = row.pop("lasso")
    if any(row.get("epoch") is None for row in run.history):
        run.history = [row for row in run.history if row.get("epoch") is not None]
        run.missing.append("Some lines of history.csv are damaged, and were left out.")
    if run.history and not any(row.get("valid_loss") is not None for row in run.history):
        run.missing.append("The run has no validation loss.")


def _read_gates(run: StoredRun) -> None:
    path = run.folder / "gates" / "gates.json"
    try:
        gates = _read_json(path)
        if gates.get("format") != 1 or not isinstance(gates.get("layers"), list):
            raise ValueError("of another version; `gates` writes a new one")
        if run.weights is not None:
            is_older = path.stat().st_mtime < run.weights.stat().st_mtime
            if is_older or Path(str(gates.get("weights"))).name != run.weights.name:
                raise ValueError(f"of other weights than {run.weights.name}; `gates` writes a new one")
        run.gates = gates
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        run.missing.append(f"{path.relative_to(run.folder)} cannot be read: {one_line(error)}")


def _state(run: StoredRun) -> str:
    done, planned = run.epochs
    try:
        with file_lock(run.folder / "recipe.yaml"):
            pass
    except BlockingIOError:
        return "running"
    except OSError:  # a folder of somebody else
        pass
    if (run.folder / "state.pt").exists():
        return "interrupted"
    return "stopped" if planned is not None and done < planned else "finished"


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError("it is too large for a file of a run")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None  # NaN is not smaller either


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
