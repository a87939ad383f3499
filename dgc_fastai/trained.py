"""Trained weights -> the network they belong to, what it says about images, and what others can load."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import load_checkpoint
from .data import input_size, read_image, statistics
from .deploy import deploy
from .errors import CheckpointError, RecipeError, UserError
from .files import write_atomically
from .learner import build_model, select_device
from .recipe import Recipe, parse_recipe

__all__ = ["Trained", "export", "load_trained", "predict"]


@dataclass
class Trained:
    """A network in evaluation mode, the recipe it was trained by, and its classes in the order of its outputs."""

    model: torch.nn.Module
    recipe: Recipe
    classes: list[str]

    def metadata(self) -> dict[str, str]:
        """What one needs to use the network elsewhere, as JSON by name."""
        channels, height, width = input_size(self.recipe.data)
        mean, std = statistics(self.recipe.data)
        preprocessing = dict(channels=channels, height=height, width=width, scale=1 / 255, mean=mean, std=std)
        return {"classes": json.dumps(self.classes), "preprocessing": json.dumps(preprocessing)}


def load_trained(path: Path) -> Trained:
    """The network of a run's weights; the file itself says which.

    Raises:
        CheckpointError: the file is missing or damaged, or was not written by a run.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        classes, text = json.loads(metadata["classes"]), metadata["recipe"]
        if not classes or not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("classes")
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else "not the weights of a run of app.py, or damaged"
        raise CheckpointError(f"{path}: cannot tell its network: {reason}") from None
    recipe = parse_recipe(text, str(path))
    model = load_checkpoint(build_model(recipe, len(classes)), path)
    return Trained(model.eval(), recipe, classes)


def predict(trained: Trained, images: Sequence[Path], batch_size: int = 64) -> Iterator[list[tuple[str, float]]]:
    """For each image its classes and their probabilities, the likeliest first.

    Raises:
        UserError: an image cannot be read.
    """
    device = select_device("auto")
    model = deploy(trained.model.to(device))
    for start in range(0, len(images), batch_size):
        batch = torch.stack([read_image(path, trained.recipe.data) for path in images[start : start + batch_size]])
        with torch.no_grad():
            probabilities = model(batch.to(device)).softmax(1).cpu()
        for row in probabilities:
            order = row.argsort(descending=True).tolist()
            yield [(trained.classes[number], float(row[number])) for number in order]


def export(trained: Trained, path: Path) -> float:
    """Write a network for use without this package: `.pt2` for torch.export, `.onnx` for ONNX.

    What was written is loaded again and compared with the network before the file appears. Both take any number of
    normalised images [B, channels, height, width], and carry class names and preprocessing as metadata.

    Returns:
        The largest difference of the outputs, relative to the largest output.

    Raises:
        UserError: the suffix is another one, a package is missing, or the outputs differ.
    """
    formats = {".pt2": _torch_export, ".onnx": _onnx}
    if path.suffix not in formats:
        raise UserError(f"{path}: export writes {' and '.join(formats)}, not {path.suffix or 'a file without suffix'}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}")
    images = torch.randn(4, *input_size(trained.recipe.data), generator=torch.Generator().manual_seed(0))
    model = trained.model.cpu()
    content, run = formats[path.suffix](trained, deploy(model), images)
    with torch.no_grad():
        # More images than it was traced with, and a single one.
        pairs = [(model(batch), run(batch)) for batch in (torch.cat([images, images.flip(3)]), images[:1])]
    difference = max(float((ours - theirs).abs().max() / ours.abs().max()) for ours, theirs in pairs)
    if not difference <= 1e-4:
        raise UserError(f"{path}: not written: its outputs differ from the network's by {difference:.1e}")
    write_atomically(path, content)
    return difference


def _torch_export(trained: Trained, model: torch.nn.Module, images: torch.Tensor):
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=trained.metadata())
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), loaded


def _onnx(trained: Trained, model: torch.nn.Module, images: torch.Tensor):
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (PyTorch's exporter imports it)
    except ImportError as error:
        hint = "pip install onnx onnxscript onnxruntime"
        raise RecipeError(f"export to ONNX needs {error.name}, which is not installed; try {hint}") from None
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:  # many lines, the reason among the last
        reason = next((line for line in str(error).splitlines() if "Error'>:" in line), type(error).__name__)
        raise UserError(f"cannot be written as ONNX: {reason}; a newer onnxscript may know how") from None
    graph = program.model_proto
    onnx.helper.set_model_props(graph, trained.metadata())
    content = graph.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
