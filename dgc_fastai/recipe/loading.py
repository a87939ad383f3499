"""Recipes from YAML files, overrides, and errors that say where."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Union

import yaml
from pydantic import ValidationError

from ..utils.errors import RecipeError
from ..utils.text import did_you_mean
from .schema import Data, Log, Model, Recipe, Section, Train
from .yaml_text import parse_yaml


# Keys of earlier versions: saved weights carry the recipe they were trained with.
RENAMED_KEYS: dict[tuple, str] = {("train", "lasso"): "lasso_weight"}


def load_recipe(path: Union[str, Path], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, check every key and value.

    Whether data, output folder and device exist is another question: see `dgc_fastai.check_machine`.

    Args:
        path: a YAML file.
        overrides: `section.key=value` each, the value as YAML.

    Raises:
        RecipeError: with the place, what is wrong there, and what to do.
    """
    return parse_recipe(_read(Path(path)), str(path), overrides)


def parse_recipe(text: str, where: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that a text holds; `where` names its source in errors. Otherwise as `load_recipe`."""
    content, lines = _parse_sections(text, where)
    _rename_old_keys(content, lines)
    for override in overrides:
        _override(content, lines, override)
    try:
        # By way of JSON, which is where pydantic's strictness and YAML's types agree on what a list is.
        return Recipe.model_validate_json(_to_json(content, where))
    except ValidationError as error:
        # Unknown keys first: a misspelt one explains the missing one.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise RecipeError("; ".join(_explain(problem, lines, where) for problem in problems[:3])) from None


def differences(first: Recipe, second: Recipe, ignore: Iterable[str] = ()) -> list[str]:
    """The keys in which two recipes differ, as `section.key`; sections and keys in `ignore` are not looked at."""
    found = []
    for name in Recipe.model_fields.keys() - set(ignore):
        pair = getattr(first, name), getattr(second, name)
        if isinstance(pair[0], Section):
            found += [
                f"{name}.{key}" for key in type(pair[0]).model_fields if getattr(pair[0], key) != getattr(pair[1], key)
            ]
        elif pair[0] != pair[1]:
            found.append(name)
    return sorted(found)


def _to_json(content: dict, where: str) -> str:
    if _size(content, {}) > 100_000:
        raise RecipeError(f"{where}: not a recipe: its anchors stand for more than a recipe can hold")
    try:
        return json.dumps(content, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # an anchor inside itself, a list as a key
        raise RecipeError(f"{where}: not a recipe: {error}") from None


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values there are when every anchor is written out; a few lines can stand for billions."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 0  # an anchor inside itself is told of by whoever writes it out
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        nearby = sorted(str(other) for other in path.parent.glob("*.yaml"))
        hint = did_you_mean(str(path), nearby) or (f"; there are {', '.join(nearby)}" if nearby else "")
        raise RecipeError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', 'not UTF-8')}{hint}") from None


def _parse_sections(text: str, where: str) -> tuple[dict, dict[tuple, str]]:
    """A recipe's content, and for each key the line it stands on."""
    content, node = parse_yaml(text, where)
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, such as 'name: quickstart'")
    lines: dict[tuple, str] = {}

    def note(node: yaml.Node, place: tuple) -> None:
        if isinstance(node, yaml.MappingNode) and len(place) < 3:
            for key, value in node.value:
                lines[(*place, str(key.value))] = f"{where}:{key.start_mark.line + 1}"
                note(value, (*place, str(key.value)))

    note(node, ())
    return content, lines


def _rename_old_keys(content: dict, lines: dict[tuple, str]) -> None:
    for (section, old), new in RENAMED_KEYS.items():
        values = content.get(section)
        if isinstance(values, dict) and old in values:
            where = lines.pop((section, old))
            if new in values:
                raise RecipeError(f"{where}: {section}.{old} is the old name of {section}.{new}; remove one of them")
            values[new], lines[section, new] = values.pop(old), where


def _override(content: dict, lines: dict[tuple, str], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise RecipeError(f"{override}: an override reads section.key=value, such as train.epochs=10")
    place = tuple(name.split("."))
    if place in RENAMED_KEYS:
        place = place[0], RENAMED_KEYS[place]
    section = content
    for key in place[:-1]:
        if not isinstance(section.setdefault(key, {}), dict):
            raise RecipeError(f"{override}: {key} is no section")
        section = section[key]
    section[place[-1]] = parse_yaml(text, override)[0]
    lines[place] = override


_SECTIONS = {"model": Model, "data": Data, "train": Train, "log": Log}


def _explain(problem: dict, lines: dict[tuple, str], source: str) -> str:
    place = tuple(problem["loc"])
    # The nearest key that is written somewhere: a missing key has no line of its own.
    where = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), source)
    name = ".".join(str(part) for part in place)
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        schema = Recipe if len(place) == 1 else _SECTIONS.get(place[0])
        known = list(schema.model_fields) if schema else []
        hint = did_you_mean(str(place[-1]), known) or f"; known are {', '.join(known)}"
        message = f"unknown key{hint}"
    elif kind == "missing":
        message = "is missing"
    elif kind == "value_error":
        message = str(problem["ctx"]["error"])
    else:
        message = message[0].lower() + message[1:]
        if not isinstance(problem["input"], (dict, list)):
            message += f", not {json.dumps(problem['input'], default=str)[:60]}"
    return f"{where}: {name}: {message}"
