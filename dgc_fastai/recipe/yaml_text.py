"""The YAML of recipes: read strictly, written compactly."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from ..utils.errors import RecipeError


class Loader(yaml.SafeLoader):
    """Safe YAML where 1e-4 is a number, as in YAML 1.2, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Dumper(yaml.SafeDumper):
    """One key per line, and lists on one line."""

    def represent_sequence(self, tag: str, sequence: Iterable, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


def parse_yaml(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """Parse YAML text into its value and its node, which has the line numbers.

    Raises:
        RecipeError: the text is not valid YAML.
    """
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        return (loader.construct_document(node) if node else None), node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # what YAML's grammar allows but Python cannot hold
        raise RecipeError(f"{where}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
