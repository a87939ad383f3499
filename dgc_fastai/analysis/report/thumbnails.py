"""Images of a batch as small pictures inside a page."""

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from ...recipe.schema import Data

__all__ = ["data_uri"]

MAX_SIDE = 96  # pixels
MAX_PNG_SIDE = 48  # smaller pictures are exact


def data_uri(image: Tensor, data: Data) -> str:
    """A normalized image [C, H, W] as a data URI of a few kilobytes: PNG if it is small, else JPEG.

    Args:
        data: by whose statistics the image is normalized.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in data.statistics)
    pixels = ((image.float() * std + mean) * 255).round().clamp(0, 255).byte()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    form, options = ("PNG", {}) if max(picture.size) <= MAX_PNG_SIDE else ("JPEG", {"quality": 80})
    file = io.BytesIO()
    picture.save(file, form, optimize=True, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
