"""What a recipe may say. Nothing else parses or validates one.

Imports neither torch nor fastai, so that a mistake is answered at once.
"""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import RecipeError

__all__ = ["Recipe", "did_you_mean", "differences", "load_recipe", "parse_recipe"]


GATES = {"heads", "squeeze_rate", "gate_factor"}
DENSENET = GATES | {"stages", "growth", "bottleneck", "group_3x3", "stem_stride", "memory_efficient"}
# Every network by name, with the keywords that are its own.
ARCHITECTURES = {
    name + twin: keywords
    for names, keywords in (
        (("dgc_densenet22", "dgc_densenet86", "dgc_condensenet74"), DENSENET),
        (("dgc_resnet18", "dgc_resnet34", "dgc_resnet50"), GATES | {"memory_efficient"}),
        (("dgc_mobilenetv2_100",), GATES),
    )
    for name in names
    for twin in ("", "_dense", "_sgc")
}

# The limits are far beyond use: they are there so that a slip of the finger does not fill the memory.
Count = Annotated[int, Field(ge=1, le=100_000)]
Width = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=100)]


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError("use letters, digits, '_', '.' and '-' only, 100 at most")
    return name


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise ValueError(f"no such device: {name!r}; use auto, cpu, cuda, cuda:N or mps")
    return name


def _known_architecture(name: str) -> str:
    if name not in ARCHITECTURES:
        raise ValueError(f"no network {name!r}{did_you_mean(name, ARCHITECTURES)}")
    return name


class Section(BaseModel):
    # Strict: a recipe's 1 is not True, and its "3" is not 3. JSON's few types suffice for every value.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """The network and its keywords; one left out keeps the network's own default."""

    arch: Annotated[str, AfterValidator(_known_architecture)]
    heads: Optional[Width] = None
    gate_factor: Optional[Share] = None
    squeeze_rate: Optional[Annotated[int, Field(ge=2, le=4096)]] = None
    stages: Optional[Annotated[list[Annotated[int, Field(ge=1, le=200)]], Field(min_length=1, max_length=8)]] = None
    growth: Optional[Annotated[list[Width], Field(min_length=1, max_length=8)]] = None
    bottleneck: Optional[Width] = None
    group_3x3: Optional[Width] = None
    stem_stride: Optional[Annotated[int, Field(ge=1, le=8)]] = None
    memory_efficient: Optional[bool] = None
    drop_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _keywords_of_this_network(self) -> "Model":
        foreign = sorted(self.keywords().keys() - ARCHITECTURES[self.arch] - {"drop_rate"})
        if foreign:
            raise ValueError(f"{self.arch} has no keyword {', '.join(foreign)}")
        return self

    def keywords(self) -> dict[str, Any]:
        """The arguments for `timm.create_model`, beside the name."""
        return self.model_dump(exclude={"arch"}, exclude_none=True)


class Data(Section):
    """The images. `size` is the side, in pixels, of what the network sees."""

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "imagenet", "folder"]
    path: Optional[Annotated[str, Field(min_length=1)]] = None
    size: Optional[Annotated[int, Field(ge=8, le=4096)]] = None
    batch_size: Count = 64
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    augment: list[Literal["crop_flip", "rand_augment", "trivial_augment", "random_erasing"]] = ["crop_flip"]
    valid_share: Optional[Annotated[float, Field(gt=0, lt=1)]] = None
    unreadable: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _keys_of_this_data(self) -> "Data":
        if self.name == "digits" and self.path is not None:
            raise ValueError("digits come with scikit-learn: leave path out")
        if self.name not in ("digits", "fashion_mnist") and self.path is None:
            raise ValueError(f"{self.name} needs path, the folder it lies in")
        if self.name != "folder" and self.valid_share is not None:
            raise ValueError(f"{self.name} has validation images of its own: leave valid_share out")
        if len(set(self.augment)) < len(self.augment):
            raise ValueError("augment names something twice")
        return self

    @property
    def folder(self) -> Path:
        """Where the images lie, `~` expanded."""
        default = "/usr/share/datasets/fashion-mnist" if self.name == "fashion_mnist" else "."  # Debian's package
        return Path(self.path or default).expanduser()

    @property
    def image_size(self) -> int:
        """`size`, or what is customary for this data."""
        customary = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32}
        return self.size or customary.get(self.name, 224)

    @property
    def held_out(self) -> float:
        """The share of a folder's images to validate with, where it has none for that."""
        return self.valid_share or 0.2


class Train(Section):
    """How long and how. `lasso` is the weight of the gates' penalty (the paper's lambda).

    `warmup` is in epochs, `clip` the largest norm of the gradient, `accumulate` batches to a step, `ema` the decay of
    the averaged weights, `mixup` and `cutmix` the alpha of their beta distributions. `nonfinite` is what to do at a
    loss that is infinite or no number: stop, or leave that batch out. `compile` is torch.compile.
    """

    epochs: Count
    optimizer: Annotated[str, AfterValidator(_plain_name)] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Strength = 1e-4
    decay_norms: bool = True
    schedule: Literal["cosine", "multistep", "one_cycle", "flat_cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.0
    lasso: Strength = 1e-5
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Strength = 0.0
    cutmix: Strength = 0.0
    clip: Optional[Annotated[float, Field(gt=0)]] = None
    accumulate: Count = 1
    ema: Optional[Annotated[float, Field(gt=0, lt=1)]] = None
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    nonfinite: Literal["stop", "skip"] = "stop"
    channels_last: bool = False
    compile: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _warm_up_within_the_run(self) -> "Train":
        if self.warmup and self.schedule == "one_cycle":
            raise ValueError("one_cycle warms up by itself: leave warmup out")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup takes {self.warmup:g} of {self.epochs} epochs: make it shorter")
        return self


class Log(Section):
    """What is told and kept, beside history, curves, last and best weights.

    `print_every` is in batches, where there is no live bar; `keep_every` in epochs.
    """

    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    print_every: Optional[Count] = None
    keep_every: Optional[Count] = None


class Recipe(Section):
    """One experiment: a network, its data, its training, where it runs and where its run folders go."""

    name: Annotated[str, AfterValidator(_plain_name)]
    model: Model
    data: Data
    train: Train
    log: Log = Log()
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    output: Annotated[str, Field(min_length=1)] = "runs"

    @property
    def runs(self) -> Path:
        """The folder that run folders go below, `~` expanded."""
        return Path(self.output).expanduser()

    def to_yaml(self) -> str:
        """The whole recipe, defaults written out; loading it gives an equal recipe."""
        return yaml.dump(self.model_dump(exclude_none=True), Dumper=_Dumper, sort_keys=False)


def load_recipe(path: Union[str, Path], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, check every key and value.

    Whether data, output folder and device exist is another question: see `dgc_fastai.preflight`.

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


class _Loader(yaml.SafeLoader):
    """Safe YAML where 1e-4 is a number, as in YAML 1.2, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _to_json(content: dict, where: str) -> str:
    if _size(content, {}) > 100_000:
        raise RecipeError(f"{where}: not a recipe: its anchors stand for more than a recipe can hold")
    try:
        return json.dumps(content, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # an anchor inside itself, a list as a key
        raise RecipeError(f"{where}: not a recipe: {error}") from None


class _Dumper(yaml.SafeDumper):
    """A key a line, a list in one."""

    def represent_sequence(self, tag: str, sequence: Iterable, flow_style: Optional[bool] = None) -> yaml.Node:
        return super().represent_sequence(tag, sequence, flow_style=True)


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values there are when every anchor is written out; a few lines can stand for billions."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 0  # an anchor inside itself is told of by whoever writes it out
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def _parse(text: str, where: str) -> tuple[Any, Optional[yaml.Node]]:
    loader = None
    try:
        loader = _Loader(text)
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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        nearby = sorted(str(other) for other in path.parent.glob("*.yaml"))
        hint = did_you_mean(str(path), nearby) or (f"; there are {', '.join(nearby)}" if nearby else "")
        raise RecipeError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', 'not UTF-8')}{hint}") from None


def _parse_sections(text: str, where: str) -> tuple[dict, dict[tuple, str]]:
    """A recipe's content, and for each key the line it stands on."""
    content, node = _parse(text, where)
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


def _override(content: dict, lines: dict[tuple, str], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise RecipeError(f"{override}: an override reads section.key=value, such as train.epochs=10")
    place = tuple(name.split("."))
    section = content
    for key in place[:-1]:
        if not isinstance(section.setdefault(key, {}), dict):
            raise RecipeError(f"{override}: {key} is no section")
        section = section[key]
    section[place[-1]] = _parse(text, override)[0]
    lines[place] = override


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the known word nearest to a misspelt one, or nothing."""
    nearest = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


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
