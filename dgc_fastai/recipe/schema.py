"""The sections of a recipe and their keys. Imports no torch, so that errors are reported at once."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from ..utils.text import did_you_mean
from .conversion import Convert
from .section import Count, Granularity, Section, Share, Strength, Width
from .yaml_text import Dumper

__all__ = ["Recipe"]


GATES = {"heads", "squeeze_rate", "gate_factor", "zero_init_gates", "granularity"}
DENSENET = GATES | {"stages", "growth", "bottleneck", "group_3x3", "stem_stride", "memory_efficient"}
# Every network by name, with the keywords it takes.
ARCHITECTURES = {
    name + baseline: keywords
    for names, keywords in (
        (("dgc_densenet22", "dgc_densenet86", "dgc_condensenet74"), DENSENET),
        (("dgc_resnet18", "dgc_resnet34", "dgc_resnet50"), GATES | {"memory_efficient", "preact"}),
        (("dgc_mobilenetv2_100",), GATES),
    )
    for name in names
    for baseline in ("", "_dense", "_sgc")
}
# Those with a layout that timm has ImageNet weights for, and timm's names; the dense baselines' names follow.
PRETRAINED = {
    "dgc_resnet18": "resnet18",
    "dgc_resnet34": "resnet34",
    "dgc_resnet50": "resnet50",
    "dgc_mobilenetv2_100": "mobilenetv2_100",
}

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Mean and standard deviation of each channel; those of CIFAR and ImageNet are the authors', digit for digit.
STATISTICS = {
    "digits": ((0.3054,), (0.3760,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": IMAGENET,
    "folder": IMAGENET,
}


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError("use letters, digits, '_', '.' and '-' only, 100 at most")
    return name


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise ValueError(f"no such device: {name!r}; use auto, cpu, cuda, cuda:N or mps")
    return name


def _known_architecture(name: str) -> str:
    """Ours are known here; timm's, with or without the tag of their weights, when the network is made."""
    if name not in ARCHITECTURES and (name.startswith("dgc_") or not re.fullmatch(r"\w{1,100}(\.\w{1,100})?", name)):
        raise ValueError(f"no network {name!r}{did_you_mean(name, ARCHITECTURES)}")
    return name


def _known_source(weights: str) -> str:
    if weights.startswith("hf-hub:") and not re.fullmatch(r"hf-hub:[\w.-]{1,100}/[\w.-]{1,100}", weights):
        raise ValueError(f"{weights!r} is not the name of a repository; use hf-hub:OWNER/NAME")
    return weights


def _as_file(weights: str) -> Path | None:
    return None if weights.startswith("hf-hub:") else Path(weights).expanduser()


class Model(Section):
    """The network and its keywords. A keyword that is left out keeps the network's default.

    `weights` are those that training starts from: a file, `hf-hub:OWNER/NAME`, `pretrained` for timm's, or `auto` for
    timm's if they can be fetched. `convert` then gives a network DGC layers.
    """

    arch: Annotated[str, AfterValidator(_known_architecture)]
    heads: Width | None = None
    gate_factor: Share | None = None
    squeeze_rate: Annotated[int, Field(ge=2, le=4096)] | None = None
    stages: Annotated[list[Annotated[int, Field(ge=1, le=200)]], Field(min_length=1, max_length=8)] | None = None
    growth: Annotated[list[Width], Field(min_length=1, max_length=8)] | None = None
    bottleneck: Width | None = None
    group_3x3: Width | None = None
    stem_stride: Annotated[int, Field(ge=1, le=8)] | None = None
    memory_efficient: bool | None = None
    zero_init_gates: bool | None = None
    granularity: Granularity | None = None
    preact: bool | None = None
    drop_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weights: Annotated[str, Field(min_length=1), AfterValidator(_known_source)] | None = None
    convert: Convert | None = None

    @model_validator(mode="after")
    def _keywords_of_this_network(self) -> "Model":
        foreign = sorted(self.keywords().keys() - ARCHITECTURES.get(self.arch, set()) - {"drop_rate"})
        if foreign:
            hint = "; set them in model.convert" if self.is_foreign and GATES & {*foreign} else ""
            raise ValueError(f"{self.arch} has no keyword {', '.join(foreign)}{hint}")
        if self.convert and self.has_gates:
            raise ValueError(f"convert: {self.arch} has DGC layers already; remove it, or use {self.arch}_dense")
        if self.weights == "pretrained" and not self.timm_name:
            hint = "; they need preact: false" if "resnet" in self.arch and not self.arch.endswith("_sgc") else ""
            raise ValueError(f"weights: timm has no weights for {self.arch} with these keywords{hint}")
        return self

    @property
    def is_foreign(self) -> bool:
        """Whether the network is one of timm's own."""
        return self.arch not in ARCHITECTURES

    @property
    def has_gates(self) -> bool:
        """Whether the network has DGC layers before any conversion."""
        return not (self.is_foreign or self.arch.endswith(("_dense", "_sgc")))

    @property
    def timm_name(self) -> str | None:
        """timm's network of this layout, which may have ImageNet weights; None if timm has none."""
        if self.is_foreign:
            return self.arch
        has_own_norms = "preact" in ARCHITECTURES[self.arch] and self.has_gates and self.preact is not False
        return None if has_own_norms else PRETRAINED.get(self.arch.removesuffix("_dense"))

    @property
    def dense(self) -> "Model":
        """The same network without gates, the baseline."""
        if self.is_foreign or self.convert:
            return self.model_copy(update={"convert": None})
        arch = self.arch.removesuffix("_dense").removesuffix("_sgc")
        return self.model_copy(update={"arch": f"{arch}_dense"})

    @property
    def weights_file(self) -> Path | None:
        """The file that the weights are read from, `~` expanded; None if they are no file."""
        return None if self.weights in (None, "pretrained", "auto") else _as_file(self.weights)

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the network for `timm.create_model`."""
        keywords = self.model_dump(exclude={"arch", "weights", "convert"}, exclude_none=True)
        if self.is_foreign and not self.drop_rate:  # which not every network takes
            del keywords["drop_rate"]
        return keywords


class Data(Section):
    """The images. `size` is the side of the network's input in pixels."""

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "imagenet", "folder"]
    path: Annotated[str, Field(min_length=1)] | None = None
    size: Annotated[int, Field(ge=8, le=4096)] | None = None
    batch_size: Count = 64
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    augment: list[Literal["crop_flip", "rand_augment", "trivial_augment", "random_erasing"]] = ["crop_flip"]
    valid_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    unreadable: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _keys_of_this_data(self) -> "Data":
        if self.name == "digits" and self.path is not None:
            raise ValueError("digits come with scikit-learn: leave path out")
        if self.name not in ("digits", "fashion_mnist") and self.path is None:
            raise ValueError(f"{self.name} needs path, the folder of its images")
        if self.name != "folder" and self.valid_share is not None:
            raise ValueError(f"{self.name} has validation images of its own: leave valid_share out")
        if len(set(self.augment)) < len(self.augment):
            raise ValueError("augment names something twice")
        return self

    @property
    def folder(self) -> Path:
        """The folder of the images, `~` expanded."""
        default = "/usr/share/datasets/fashion-mnist" if self.name == "fashion_mnist" else "."  # of Debian's package
        return Path(self.path or default).expanduser()

    @property
    def image_size(self) -> int:
        """Side of the network's input in pixels: `size`, or the usual one for this data."""
        usual = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32}
        return self.size or usual.get(self.name, 224)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, for values in [0, 1]."""
        return STATISTICS[self.name]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input."""
        return len(self.statistics[0]), self.image_size, self.image_size

    @property
    def is_image_files(self) -> bool:
        """Whether images are read file by file; the other sets are held in memory."""
        return self.name in ("imagenet", "folder")

    @property
    def held_out(self) -> float:
        """Share of a folder's images to hold out for validation, if it has no validation folder."""
        return self.valid_share or 0.2


class Train(Section):
    """The training.

    `lasso_weight` is the weight of the gate penalty (lambda in the paper). `warmup` is in epochs, `clip` the maximum
    norm of the gradient, `accumulate` the batches per step, `ema` the decay of the averaged weights; `mixup` and
    `cutmix` are the alpha of their beta distributions. `nonfinite` says what to do if a loss is NaN or Inf: stop, or
    skip the batch. `teacher` is a weights file, or `before` for the network before `model.convert`; `teacher_weight`
    its share in the loss. `compile` is torch.compile. `precision` auto and `channels_last` None are what suits the
    device.
    """

    epochs: Count
    optimizer: Annotated[str, AfterValidator(_plain_name)] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Strength = 1e-4
    decay_norms: bool = True
    schedule: Literal["cosine", "multistep", "one_cycle", "flat_cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.0
    lasso_weight: Strength = 1e-5
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Strength = 0.0
    cutmix: Strength = 0.0
    teacher: Annotated[str, Field(min_length=1)] | None = None
    teacher_weight: Share = 0.5
    teacher_temperature: Annotated[float, Field(gt=0, le=100)] = 4.0
    clip: Annotated[float, Field(gt=0)] | None = None
    accumulate: Count = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    nonfinite: Literal["stop", "skip"] = "stop"
    channels_last: bool | None = None
    compile: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def teacher_file(self) -> Path | None:
        """The file, or the run folder, that the teacher is read from, `~` expanded."""
        return None if self.teacher in (None, "before") else Path(self.teacher).expanduser()

    @model_validator(mode="after")
    def _warm_up_within_the_run(self) -> "Train":
        if self.warmup and self.schedule == "one_cycle":
            raise ValueError("one_cycle warms up by itself: leave warmup out")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup takes {self.warmup:g} of {self.epochs} epochs: make it shorter")
        return self


class Log(Section):
    """What is printed and kept, besides the history, the curves and the last and best weights.

    `print_every` is in batches, for output without a progress bar; `keep_every` in epochs. `report` says whether a run
    ends with a page about it.
    """

    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    print_every: Count | None = None
    keep_every: Count | None = None
    report: bool = True


class Recipe(Section):
    """One experiment: a network, its data, its training, the device, and the folder for its runs."""

    name: Annotated[str, AfterValidator(_plain_name)]
    model: Model
    data: Data
    train: Train
    log: Log = Log()
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    output: Annotated[str, Field(min_length=1)] = "runs"

    @model_validator(mode="after")
    def _teacher_before_conversion(self) -> "Recipe":
        if self.train.teacher == "before" and not self.model.convert:
            raise ValueError("train.teacher: before is the network before model.convert, and there is no model.convert")
        return self

    @property
    def runs(self) -> Path:
        """The folder for the run folders, `~` expanded."""
        return Path(self.output).expanduser()

    def to_yaml(self) -> str:
        """The whole recipe with every default. Loading it gives an equal recipe."""
        return yaml.dump(self.model_dump(exclude_none=True), Dumper=Dumper, sort_keys=False)

    def with_choice_of(self, begun: "Recipe | None") -> "Recipe":
        """This recipe, with the gate factors that another one has been given for the same `model.convert.target`."""
        own, other = self.model.convert, begun.model.convert if begun else None
        if not (own and other and own.has_to_choose) or other.has_to_choose:
            return self
        if (own.target, own.target_ms) != (other.target, other.target_ms):
            return self
        return self.with_gate_factor(other.gate_factor)

    def without_choice(self) -> "Recipe":
        """This recipe as it was before gate factors were chosen for its target; the same if none were."""
        settings = self.model.convert
        if settings is None or settings.has_to_choose or not (settings.target or settings.target_ms):
            return self
        return self.with_gate_factor(type(settings)().gate_factor)

    def with_gate_factor(self, gate_factor: float | dict[str, float]) -> "Recipe":
        """This recipe, with another `model.convert.gate_factor`."""
        assert self.model.convert
        convert = self.model.convert.model_copy(update={"gate_factor": gate_factor})
        return self.model_copy(update={"model": self.model.model_copy(update={"convert": convert})})

    def resolved(self, precision: str, channels_last: bool | None) -> "Recipe":
        """This recipe, with values for those keys that it leaves to the device."""
        update: dict[str, Any] = {}
        if self.train.precision == "auto":
            update["precision"] = precision
        if self.train.channels_last is None:
            update["channels_last"] = channels_last
        return self.model_copy(update={"train": self.train.model_copy(update=update)})
