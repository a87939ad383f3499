"""Networks in formats that others can load: torch.export and ONNX."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..utils.errors import RecipeError, UserError
from ..utils.files import write_atomically
from .deploy import deploy
from .predict import Predictor

__all__ = ["export", "onnx_graph"]

Run = Callable[[Tensor], Tensor]


def export(predictor: Predictor, path: Path) -> float:
    """Write a network for use without this package: `.pt2` for torch.export, `.onnx` for ONNX.

    Both formats take any number of normalized images [B, channels, height, width] and carry the names of the classes
    and the preprocessing as metadata. The file is written only if what is in it, loaded again, gives the network's
    outputs.

    Returns:
        The largest difference of the outputs, relative to the largest output.

    Raises:
        UserError: the suffix is another one, the folder or a package is missing, or the outputs differ.
    """
    formats = {".pt2": _torch_export, ".onnx": _onnx}
    if path.suffix not in formats:
        raise UserError(f"{path}: export writes {' and '.join(formats)}, not {path.suffix or 'a file without suffix'}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}")
    images = torch.randn(4, *predictor.recipe.data.input_size, generator=torch.Generator().manual_seed(0))
    model = predictor.model.cpu()
    content, run = formats[path.suffix](predictor, deploy(model), images)
    with torch.no_grad():
        # A larger batch than the traced one, and a single image.
        pairs = [(model(batch), run(batch)) for batch in (torch.cat([images, images.flip(3)]), images[:1])]
    difference = max(float((ours - theirs).abs().max() / ours.abs().max()) for ours, theirs in pairs)
    if not difference <= 1e-4:
        raise UserError(f"{path}: not written: its outputs differ from the network's by {difference:.1e}")
    write_atomically(path, content)
    return difference


def _torch_export(predictor: Predictor, model: nn.Module, images: Tensor) -> tuple[bytes, Run]:
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=predictor.metadata())
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), loaded


def _onnx(predictor: Predictor, model: nn.Module, images: Tensor) -> tuple[bytes, Run]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (PyTorch's exporter imports it)
    except ImportError as error:
        hint = "pip install onnx onnxscript onnxruntime"
        raise RecipeError(f"export to ONNX needs {error.name}, which is not installed; try {hint}") from None
    graph = onnx_graph(model, images)
    onnx.helper.set_model_props(graph, predictor.metadata())
    content = graph.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def onnx_graph(model: nn.Module, images: Tensor) -> Any:
    """An ONNX `ModelProto` of a network, from `images` to `logits`, for any number of images.

    Args:
        images: [B, C, H, W], B at least 2.

    Raises:
        UserError: PyTorch's exporter cannot write it.
    """
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
    assert program is not None  # it is with dynamo=True
    return program.model_proto
