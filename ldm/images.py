"""Pictures: any kind to tensors, tensors to Pillow and numpy, grids, PNG files that know their parameters."""
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

if TYPE_CHECKING:                  # loaded where tensors are made; a grid and the PNG files need none
    from torch import Tensor

CHUNK = "ldm"                      # keyword of the PNG text chunk
GAP   = 4                          # white pixels between the pictures of a grid
ROUNDING = 1e-4                    # of floats beyond [0, 1] that are taken for 0 or 1


def read(image: Any, background: float = 1.0) -> "list[Tensor]":
    """A picture of any kind, or a list of them → tensors (3, H, W) in [0, 1], float32, of their own sizes.

    image: a Pillow picture; the path of a file; an array (H, W), (H, W, C) or (N, H, W, C); or a tensor
        (C, H, W) or (N, C, H, W). C is 1, 3 or 4. The numbers are floats in [0, 1], or whole ones from 0 to
        the highest of their unsigned type.

    The rotation in a photo's EXIF data is applied. What is transparent is laid on white, or on another grey,
    `background` in [0, 1]. Of an animation, the first picture is taken. Colour profiles are not applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: it cannot be understood as a picture; says what came in.
    """
    import torch
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError("There is no picture: the list is empty.")
        return [picture for item in image for picture in read(item, background)]
    if isinstance(image, str | Path):
        image = _open(image)
    if isinstance(image, Image.Image):
        image = _levels(image)
    if isinstance(image, torch.Tensor):
        planes = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    elif isinstance(image, np.ndarray):
        planes = image[..., None] if image.ndim == 2 else image
        planes = np.moveaxis(planes, -1, -3) if planes.ndim > 2 else planes
    else:
        raise TypeError(f"A picture is Pillow's, a path, an array or a tensor; got {type(image).__name__}.")
    if planes.ndim not in (3, 4) or planes.shape[-3] not in (1, 3, 4) or 0 in planes.shape:
        raise ValueError(f"A picture has the shape (H, W), (H, W, C) or (N, H, W, C) as an array, (C, H, W) "
                         f"or (N, C, H, W) as a tensor, with C = 1, 3 or 4; got {tuple(image.shape)}.")
    if planes.dtype.kind == "u":
        planes = np.divide(planes, np.iinfo(planes.dtype).max, dtype=np.float32)
    elif planes.dtype.kind not in "bf":
        raise ValueError(f"A picture has floats in [0, 1] or unsigned whole numbers; got {planes.dtype}.")
    planes = np.array(planes, dtype=np.float32)
    if not (planes.min() >= -ROUNDING and planes.max() <= 1 + ROUNDING):
        raise ValueError(f"A picture has its floats in [0, 1]; got {planes.min():.3g} … {planes.max():.3g}.")
    planes = planes.clip(0, 1)
    if planes.shape[-3] == 4:
        alpha  = planes[..., 3:, :, :]
        planes = planes[..., :3, :, :] * alpha + background * (1 - alpha)
    return [torch.from_numpy(picture).expand(3, -1, -1) for picture in planes.reshape(-1, *planes.shape[-3:])]


def _levels(image: Image.Image) -> np.ndarray:
    """(H, W) or (H, W, 3 or 4), as `read` takes it."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":                           # one channel of 16 or 32 bits
            return np.asarray(image) / (65535 if image.mode[0] == "I" else 1)
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    except (OSError, ValueError) as error:                  # a truncated file, or an odd mode
        raise ValueError(f"Pillow cannot turn a picture of mode {image.mode} into RGB: {error}.") from error


def fit(pictures: "Sequence[Tensor]", height: int | None, width: int | None, unit: int) -> "Tensor":
    """Pictures (3, H, W) in [0, 1] → (N, 3, height, width), never stretched.

    Both given: each picture is scaled until it covers height × width, and its middle is cut out.
    One given:  the other follows the proportions of the picture, rounded down to a multiple of `unit`.
    None given: it is not scaled; the middle is cut out, of a size rounded down to multiples of `unit`.

    ValueError: the pictures come out in different sizes, or smaller than one unit.
    """
    import torch
    fitted = [_fit_one(picture, height, width, unit) for picture in pictures]
    sizes  = {tuple(picture.shape[:0:-1]) for picture in fitted}
    if len(sizes) != 1:
        raise ValueError(f"A call takes pictures of one size; here are {len(fitted)} of (width, height) = "
                         f"{sorted(sizes)}. Give height and width to scale and crop them.")
    return torch.stack(fitted)


def _fit_one(picture: "Tensor", height: int | None, width: int | None, unit: int) -> "Tensor":
    h, w  = picture.shape[1:]
    scale = max((wanted / side for wanted, side in ((height, h), (width, w)) if wanted), default=1.0)
    size  = round(h * scale), round(w * scale)
    height, width = height or size[0] // unit * unit, width or size[1] // unit * unit
    if not (height and width):
        raise ValueError(f"A picture of {size[1]} × {size[0]} pixels is too small; it takes {unit} × {unit}.")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resize(picture[None], size)[0, :, top:top + height, left:left + width]


def resize(pictures: "Tensor", size: tuple[int, int]) -> "Tensor":
    """(N, C, H, W) in [0, 1] → (N, C, *size), bicubic and without aliasing."""
    import torch.nn.functional as F
    if pictures.shape[-2:] == size:
        return pictures
    return F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)


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
    text = json.dumps(dict(parameters), ensure_ascii=False)
    text = text.encode("utf-8", "backslashreplace").decode()    # the name of a file may be no text
    info.add_itxt(CHUNK, text)                                  # iTXt: the text is UTF-8
    image.save(path, format="PNG", pnginfo=info)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """What `save_png` wrote beside the picture.

    FileNotFoundError: there is no such file.
    ValueError: it is not a picture, or carries no parameters of ldm.
    """
    text = _open(path).info.get(CHUNK)
    if text is None:
        raise ValueError(f"{path} carries no parameters of ldm: only PNG files that the command `ldm` wrote "
                         f"do, and many programs drop them when they save a picture again")
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the parameters of ldm in this file are damaged: {error}") from error
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: the parameters of ldm in this file are damaged: not a JSON object")
    return parameters


def _open(path: str | Path) -> Image.Image:
    """A file as a Pillow picture, read to its end: text chunks may follow the pixels."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:                 # Pillow's words for a broken file
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
