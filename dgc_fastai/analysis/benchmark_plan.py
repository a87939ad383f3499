"""What a benchmark measures: a recipe's network in its states, its baselines, its deployed forms, and its data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial

import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import Tensor, nn

from ..data.classes import class_names
from ..inference.deploy import deploy
from ..layers.gate_schedule import dgc_layers, gate_penalty, set_progress
from ..models.factory import build_model, prepare
from ..ops.device import device_wait, resolve, select_device, use_device
from ..ops.selection import use_backend
from ..recipe.schema import Data, Model, Recipe
from ..training.learner import assemble
from ..utils.errors import RecipeError
from .throughput import Source, pipeline_sources, repeat
from .timing import Measurement, Variant

__all__ = ["gated_name", "plan_benchmark", "plan_data", "step_name"]

BASELINE = "dense"
BASELINE_AGAIN = "dense again"  # the same network at the other end of a round: how far its times are from itself
DENSE_CHANNELS_LAST = f"{BASELINE} channels-last"
HALF_CLOSED = "ours at 0.5"

Network = Callable[[Tensor], Tensor]


def gated_name(arch: str) -> str:
    """The gated network of a name that may be one of its baselines': dgc_resnet18_sgc -> dgc_resnet18."""
    return arch.removesuffix("_dense").removesuffix("_sgc")


def plan_benchmark(recipe: Recipe, compiled: bool = True) -> list[Measurement]:
    """What to measure of a recipe's network: a training step, inference of one image and of a batch.

    Networks, random images and labels are on the recipe's device, which need not have the recipe's data.

    Args:
        compiled: also measure inference of networks compiled by torch.compile, which takes minutes to compile.

    Raises:
        RecipeError: the network, the optimizer or the device is not available.
    """
    device = use_device(recipe.device)
    recipe = resolve(recipe, device)
    set_seed(recipe.train.seed)
    size, classes = recipe.data.batch_size, _class_count(recipe.data)
    images = torch.randn(size, *recipe.data.input_size, device=device)
    if recipe.train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, (size,), device=device)
    networks = _networks(recipe, classes, device)
    plan = [_training_measurement(recipe, networks, images, labels)]
    forms = _deployed_forms(networks, compiled)
    for count in sorted({1, size}):
        plan.append(_inference_measurement(recipe, networks, forms, images[:count]))
    return plan


def plan_data(recipe: Recipe) -> list[Source]:
    """What to measure of a recipe's input: training steps of two networks, and the data pipeline by itself.

    Raises:
        RecipeError: as in `plan_benchmark`, or the data are not there.
    """
    step = plan_benchmark(recipe, compiled=False)[0]
    wait = device_wait(select_device(recipe.device))

    def train(variant: Variant) -> tuple[int, float]:
        def one_step() -> int:
            variant.call()
            wait()
            return step.batch

        with variant.setting():
            return repeat(one_step)

    variants = [variant for variant in step.variants if variant.name in (BASELINE, HALF_CLOSED)]
    return [
        *(Source(step_name(variant.name), partial(train, variant)) for variant in variants),
        *pipeline_sources(recipe, select_device(recipe.device), wait),
    ]


def step_name(variant: str) -> str:
    """The name of a variant's training step among the sources of `plan_data`."""
    return f"training step, {variant}"


def _networks(recipe: Recipe, classes: int, device: torch.device) -> dict[str, nn.Module]:
    """The gated network, under "", and its baselines, under the suffixes of their names.

    Raises:
        RecipeError: no network of these has gates.
    """
    networks = {}
    for suffix, model in _models(recipe.model).items():
        network = build_model(model, classes, recipe.data.input_size)
        networks[suffix] = prepare(network, recipe.train, device)
    return networks


def _models(model: Model) -> dict[str, Model]:
    if model.convert:
        return {"": model, "_dense": model.dense}
    if model.is_foreign:
        raise RecipeError(f"model.convert: {model.arch} has no gates to benchmark without it; set it")
    name = gated_name(model.arch)
    return {suffix: model.model_copy(update={"arch": name + suffix}) for suffix in ("", "_dense", "_sgc")}


def _variants(progresses: Sequence[float], has_static_groups: bool) -> list[tuple[str, str, float, str | None]]:
    """Name, network, progress and backend of each variant; the baseline comes twice, to show the noise."""
    gated = [
        (f"{name} at {progress:g}", "", progress, backend)
        for name, backend in (("reference", "reference"), ("ours", None))
        for progress in progresses
    ]
    baselines = [(BASELINE, "_dense", 0.0, None)]
    if has_static_groups:
        baselines.append(("sgc", "_sgc", 0.0, None))
    return [*baselines, *gated, (BASELINE_AGAIN, "_dense", 0.0, None)]


def _training_measurement(
    recipe: Recipe, networks: dict[str, nn.Module], images: Tensor, labels: Tensor
) -> Measurement:
    steps = {suffix: training_step(recipe, network, images, labels) for suffix, network in networks.items()}
    variants = [
        Variant(name, partial(_network_state, networks[suffix], True, progress, backend), steps[suffix])
        for name, suffix, progress, backend in _variants((0.0, 0.5, 1.0), "_sgc" in networks)
    ]
    if not recipe.train.channels_last:  # in which dense networks, but not ours, may train faster on a CPU
        dense = deepcopy(networks["_dense"]).to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        state = partial(_network_state, dense, True, 0.0, None)
        variants.insert(1, Variant(DENSE_CHANNELS_LAST, state, training_step(recipe, dense, images, labels)))
    return Measurement("training step", len(images), variants, with_memory=True)


def _deployed_forms(networks: dict[str, nn.Module], compiled: bool) -> dict[str, Network]:
    """For inference: the dense baseline in its usually fastest memory format, the deployed network, both compiled."""
    set_progress(networks[""], 1.0)
    dense = deepcopy(networks["_dense"]).eval().to(memory_format=torch.channels_last)
    forms: dict[str, Network] = {DENSE_CHANNELS_LAST: dense, "deployed": deploy(networks[""])}
    if compiled:
        forms |= {f"{BASELINE} compiled": dense, "deployed compiled": forms["deployed"]}
    return forms


def _inference_measurement(
    recipe: Recipe, networks: dict[str, nn.Module], forms: dict[str, Network], images: Tensor
) -> Measurement:
    *variants, again = (
        Variant(
            name,
            partial(_network_state, networks[suffix], False, progress, backend),
            partial(_infer, recipe, networks[suffix], images),
        )
        for name, suffix, progress, backend in _variants((1.0,), "_sgc" in networks)
    )
    for name, form in forms.items():
        form = _compiled(form, images.device) if "compiled" in name else form
        variants.append(Variant(name, nullcontext, partial(_infer, recipe, form, images)))
    return Measurement("inference", len(images), [*variants, again], with_memory=False)


def _compiled(network: Network, device: torch.device) -> Network:
    """Compiled by torch.compile with frozen weights, for one batch size, and as a CUDA graph on CUDA."""
    return torch.compile(network, dynamic=False, options={"freezing": True, "triton.cudagraphs": device.type == "cuda"})


def _class_count(data: Data) -> int:
    try:
        return len(class_names(data))
    except RecipeError:  # the files are not here, and are not needed
        return {"cifar10": 10, "cifar100": 100}.get(data.name, 1000)


@contextmanager
def _network_state(network: nn.Module, training: bool, progress: float, backend: str | None) -> Iterator[None]:
    network.train(training)
    set_progress(network, progress)
    with use_backend(backend):
        yield
    for layer in dgc_layers(network):
        layer.penalty = None  # or the next variant's step would free memory that this one has allocated


def training_step(recipe: Recipe, network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of the recipe's training, without weight averaging, accumulation, gradient clipping and mixing.

    The learning rate is zero, so that the weights are the same in every round.

    Args:
        images, labels: a batch on the network's device, [B, C, H, W] and [B].
    """
    learn = assemble(recipe, DataLoaders(), network)
    learn.opt.set_hyper("lr", 0.0)
    optimizer, loss_function, lasso_weight = learn.opt.opt, learn.loss_func, recipe.train.lasso_weight
    # The usual initial scale overflows in the first steps, which would then be skipped.
    scaler = torch.amp.GradScaler(images.device.type, init_scale=1.0, enabled=recipe.train.precision == "fp16")

    def step() -> None:
        with _autocast(recipe, images.device):
            loss = loss_function(network(images), labels) + lasso_weight * gate_penalty(network)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()  # at the end, so that the gradients count as memory that the step allocates

    return step


def _infer(recipe: Recipe, network: Network, images: Tensor) -> None:
    with torch.inference_mode(), _autocast(recipe, images.device):
        network(images)


def _autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
