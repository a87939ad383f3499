"""Recipes from YAML files, overrides, and errors that say where."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from ..utils.errors import RecipeError
from ..utils.invocation import display_path
from ..utils.text import did_you_mean
from .auto import choose_settings
from .catalogue import find_recipe, recipe_names
from .conversion import Convert
from .schema import Data, Log, Model, Recipe, Train
from .section import Section
from .yaml_text import parse_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# Keys of earlier versions: saved weights carry the recipe they were trained with.
TARGETS = {("model", "convert", "target"), ("model", "convert", "target_ms")}
RENAMED_KEYS: dict[tuple, str] = {("train", "lasso"): "lasso_weight", ("model", "pretrained"): "weights"}
OLD_VALUES: dict[tuple, dict] = {("model", "pretrained"): {False: None, True: "pretrained"}}


def load_recipe(path: str | Path, overrides: Iterable[str] = (), notes: list[str] | None = None) -> Recipe:
    """Read a recipe, apply overrides, and check every key and value.

    Whether the data, the output folder and the device exist is not checked: see `recipe.machine.check_machine`.

    Args:
        path: a YAML file, or the name of a recipe that comes with the package, such as `quickstart`.
        overrides: `section.key=value` each, the value in YAML.
        notes: takes a sentence about what was chosen for `auto`, if the recipe has it.

    Raises:
        RecipeError: says where the error is, what is wrong and what to do.
    """
    found = find_recipe(path)
    return parse_recipe(_read(found), display_path(found), overrides, notes)


def parse_recipe(text: str, where: str, overrides: Iterable[str] = (), notes: list[str] | None = None) -> Recipe:
    """Parse the text of a recipe. As `load_recipe`; `where` names the source of the text in errors."""
    content, lines = _parse_sections(text, where)
    _rename_old_keys(content, lines)
    for override in overrides:
        _override(content, lines, override)
    note = choose_settings(content, lines, where)
    if note and notes is not None:
        notes.append(note)
    try:
        # Through JSON, whose types are those of YAML: pydantic's strict mode converts nothing.
        return Recipe.model_validate_json(_to_json(content, where))
    except ValidationError as error:
        # Unknown keys first: a misspelt key explains a missing one.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise RecipeError("; ".join(_explain(problem, lines, where) for problem in problems[:3])) from None


def differences(first: Recipe, second: Recipe, ignore: Iterable[str] = ()) -> list[str]:
    """The keys in which two recipes differ, as `section.key`, without the sections and top-level keys in `ignore`."""
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


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of a key such as `train.lr`, as JSON can hold it: of a section, what differs from its defaults."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part, None)
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, Section) else value


def _to_json(content: dict, where: str) -> str:
    if _size(content, {}) > 100_000:
        raise RecipeError(f"{where}: not a recipe: its anchors expand to more than a recipe can hold")
    try:
        return json.dumps(content, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # an anchor inside itself, a list as a key
        raise RecipeError(f"{where}: not a recipe: {error}") from None


def _size(value: Any, known: dict[int, int]) -> int:
    """Number of values with every anchor expanded; a few lines can expand to billions."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 0  # a recursive anchor is reported when it is serialized
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise RecipeError(f"{path}: cannot read the recipe: {reason}{_other_recipes(path)}") from None


def _other_recipes(path: Path) -> str:
    """The end of an error message about a recipe that cannot be read: which others there are."""
    if (path / "recipe.yaml").is_file():
        return f"; did you mean the recipe of this run, '{path / 'recipe.yaml'}'?"
    if path.is_file():
        return ""
    nearby = sorted(str(other) for other in path.parent.glob("*.yaml"))
    if path.name == str(path):  # without a folder it may be a name
        nearby = [*recipe_names(), *nearby]
    return did_you_mean(str(path), nearby) or (f"; there are {', '.join(nearby)}" if nearby else "")


def _parse_sections(text: str, where: str) -> tuple[dict, dict[tuple, str]]:
    """The content of a recipe, and for each key where it is: `file:line`."""
    content, node = parse_yaml(text, where)
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, such as 'name: quickstart'")
    lines: dict[tuple, str] = {}

    def note(node: yaml.Node | None, place: tuple) -> None:
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
            values[new], lines[section, new] = _new_value((section, old), values.pop(old)), where


def _new_value(place: tuple, value: Any) -> Any:
    """What a value of a renamed key is called now."""
    return next((new for old, new in OLD_VALUES.get(place, {}).items() if value is old), value)


def _override(content: dict, lines: dict[tuple, str], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise RecipeError(f"{override}: an override reads section.key=value, such as train.epochs=10")
    place, old = tuple(name.split(".")), tuple(name.split("."))
    if place in RENAMED_KEYS:
        place = place[0], RENAMED_KEYS[place]
    section = content
    for depth, key in enumerate(place[:-1], 1):
        if section.get(key) is None:
            section[key] = {}
        if not isinstance(section[key], dict):
            raise RecipeError(f"{override}: {key} is not a section")
        section = section[key]
        lines.setdefault(place[:depth], override)  # of a section that is not in the file
    section[place[-1]] = _new_value(old, parse_yaml(text, override)[0])
    lines[place] = override
    if place in TARGETS and isinstance(section.get("gate_factor"), dict):
        if "=" not in lines.get((*place[:-1], "gate_factor"), ""):  # a run's recipe has those of its own target
            del section["gate_factor"]


_SECTIONS: dict[Any, type[Section]] = {"model": Model, "data": Data, "train": Train, "log": Log}
_INNER_SECTIONS: dict[tuple, type[Section]] = {("model", "convert"): Convert}
# Pydantic's and JSON's words for what YAML calls otherwise.
_MESSAGES = {"list_type": "input should be a list", "model_type": "input should be a section of keys and values"}


def _explain(problem: "ErrorDetails", lines: dict[tuple, str], source: str) -> str:
    """One line about one of pydantic's errors: where, which key, what is wrong, what to do."""
    place = tuple(problem["loc"])
    # The nearest key that has a line: a missing key has none of its own.
    where = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), source)
    name = ".".join(str(part) for part in place)
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        message = f"unknown key{_known_keys(place)}"
    elif kind == "missing":
        message = "is missing"
    elif kind == "value_error":
        message = str(problem["ctx"]["error"])
        where = _blamed_override(place, lines, message) or where
    else:
        message = _MESSAGES.get(kind, message[0].lower() + message[1:])
        if not isinstance(problem["input"], (dict, list)):
            message += f", not {json.dumps(problem['input'], default=str)[:60]}"
    if not place:  # about two sections, whose keys the message names
        named = (line for line in lines.values() if "=" in line and line.partition("=")[0] in message)
        return f"{next(named, where)}: {message}"
    # An override names its key itself.
    return f"{where}: {message}" if where.startswith(f"{name}=") else f"{where}: {name}: {message}"


def _blamed_override(place: tuple, lines: dict[tuple, str], message: str) -> str:
    """The override in a section whose key or value an error about the whole section mentions, or nothing."""
    for key, where in lines.items():
        name, equals, value = where.partition("=")
        if equals and key[: len(place)] == place and name == ".".join(key) and (key[-1] in message or value in message):
            return where
    return ""


def _known_keys(place: tuple) -> str:
    """The end of an error message about an unknown key: the key that was probably meant, or all there are."""
    if len(place) > 1:
        schema = _INNER_SECTIONS.get(place[:-1]) or _SECTIONS.get(place[0])
        section = f"{'.'.join(map(str, place[:-1]))}."
        known = list(schema.model_fields) if schema else []
        return did_you_mean(str(place[-1]), known, section) or f"; known are {', '.join(known)}"
    key, known = str(place[0]), list(Recipe.model_fields)
    inside = [name for name, schema in _SECTIONS.items() if key in schema.model_fields]
    if inside:  # a key without its section
        return f"; did you mean {' or '.join(repr(f'{name}.{key}') for name in inside)}?"
    if similar := did_you_mean(key, known):
        return similar
    sections = {name: section for section, schema in _SECTIONS.items() for name in schema.model_fields}
    for name in difflib.get_close_matches(key.lower(), sections, n=1, cutoff=0.8):
        return f"; did you mean '{sections[name]}.{name}'?"
    return f"; known are {', '.join(known)}"
