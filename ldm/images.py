"""Pictures: tensors to Pillow and numpy, grids, and PNG files that remember how they were made."""
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin

if TYPE_CHECKING:                  # tensors come in as arguments: to read or write a picture loads no torch
    from torch import Tensor

CHUNK = "ldm"                      # keyword of the PNG text chunk
GAP   = 4                          # white pixels between the pictures of a grid


def to_unit(images: "Tensor") -> "Tensor":
    """From the range [-1, 1] of the autoencoder to [0, 1], clipped; float32, of any shape."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def to_numpy(images: "Tensor") -> np.ndarray:
    """(N, 3, H, W) in [0, 1] on any device → (N, H, W, 3), float32."""
    return images.detach().permute(0, 2, 3, 1).float().cpu().numpy()


def to_pil(images: "Tensor") -> list[Image.Image]:
    """(N, 3, H, W) in [0, 1] → N Pillow pictures in RGB, rounded to the nearest of 256 levels."""
    return [Image.fromarray(pixels) for pixels in (to_numpy(images) * 255).round().astype(np.uint8)]


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of several of the same size, in rows from left to right, with white gaps of 4 pixels.

    `columns` defaults to ⌈√n⌉, the squarest arrangement. ValueError: no pictures, or of different sizes.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs at least one picture, and all of one size; got {len(images)} of the "
                         f"sizes {sorted(sizes)} (width, height)")
    (width, height), = sizes
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows    = math.ceil(len(images) / columns)
    sheet   = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return sheet


def save_png(image: Image.Image, path: str | Path, parameters: Mapping[str, Any]) -> None:
    """Write a PNG with `parameters` (what JSON can hold) in a text chunk; `read_parameters` returns them."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(dict(parameters), ensure_ascii=False))      # iTXt: the text is UTF-8
    image.save(path, format="PNG", pnginfo=info)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """What `save_png` wrote beside the picture.

    FileNotFoundError: there is no such file.
    ValueError: it is not a picture, or carries no parameters of ldm.
    """
    try:
        with Image.open(path) as image:
            image.load()                                                # text chunks may follow the pixels
            text = image.info.get(CHUNK)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:                 # Pillow's words for a broken file
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if text is None:
        raise ValueError(f"{path} carries no parameters of ldm: only PNG files that the command `ldm` wrote "
                         f"do, and many programs drop them when they save a picture again")
    try:
        parameters = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: the parameters of ldm in this file are damaged: {error}") from error
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: the parameters of ldm in this file are damaged: not a JSON object")
    return parameters
