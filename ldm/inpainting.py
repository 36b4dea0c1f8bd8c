"""Inpainting: a new part in a given picture. Masks, the denoiser that keeps the rest, and where to paint.

A mask is (N, 1, H, W) in [0, 1]: what is 1 is painted anew, what is 0 stays. The network paints all that is ½
or more; between 0 and 1, what it paints is blended with the picture. It respects the rest in one of two ways:

    the U-Net has      what it is told                                  outside the mask
    4 channels         nothing, it may be any model                     the answer is known, see `keep`
    9 = 4 + 1 + 4      the mask, and the latents of the masked picture  its own affair, it was trained for it

Either way the autoencoder changes every pixel. So at the end the painted part is put onto the picture that
came in, and outside the mask every pixel is the old one, to the bit.
"""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import images
from .denoiser import Denoise

SPECK = 4 / 255         # what is brighter in a mask counts as touched; more than the noise of a JPEG


def keep(denoise: Denoise, z: Tensor, mask: Tensor, noise: Tensor, start: float) -> Denoise:
    """A denoiser that knows the answer where the mask is 0: there D(x; σ) = z, whatever the network says.

    The network itself sees z + σ·noise there, the picture as it would be at that σ, so that the new part
    grows to fit it (Lugmayr et al. 2022, "RePaint", without resampling). The scheduler's x and its history
    are left alone, so any scheduler will do.

    z:     (N, 4, h, w), the latents of the picture.
    mask:  (N, 1, h, w).
    noise: like z, from which the run started.
    start: the σ at which it did. There the network sees x as it is: at strength 1 that is noise alone, and
           holds no z.
    """
    def kept(x: Tensor, sigma: float) -> Tensor:
        known = z + sigma * noise if sigma < start else x
        return torch.lerp(z, denoise(torch.lerp(known, x, mask), sigma), mask)
    return kept


def read_mask(mask: Any, height: int, width: int, invert: bool = False) -> Tensor:
    """A mask of any kind, or a list of them → (N, 1, height, width) in [0, 1], float32.

    mask:   all that `images.read` takes, and a tensor (H, W). A colour counts by its brightest channel; what
            is transparent is black, as where nobody has drawn. One of another size, but of the proportions of
            the picture, is scaled: each pixel gets the mean of those of the mask that it touches.
    invert: black is what is painted anew.

    ValueError, TypeError: it cannot be read; it does not fit; or it is nowhere ½ or more.
    """
    given = mask if isinstance(mask, list | tuple) else [mask]
    given = [item[None] if isinstance(item, Tensor) and item.ndim == 2 else item for item in given]
    try:
        masks = images.read(given, background=0.0)
    except (TypeError, ValueError) as error:
        raise type(error)(f"The mask cannot be used: {error}") from error
    return torch.stack([_fitted(1 - grey if invert else grey, height, width)
                        for grey in (picture.amax(dim=0, keepdim=True) for picture in masks)])


def _fitted(grey: Tensor, height: int, width: int) -> Tensor:
    h, w = grey.shape[1:]
    if min(abs(h - w * height / width), abs(w - h * width / height)) >= 1:          # less is a rounded side
        raise ValueError(f"The mask of {w} × {h} pixels does not fit a picture of {width} × {height}: they "
                         f"must have the same proportions.")
    grey = F.adaptive_avg_pool2d(grey, (height, width))
    if grey.max() < 0.5:
        raise ValueError(f"There is nothing to paint: the mask is {grey.max():.3g} at its highest, where 0 "
                         f"stays and ½ to 1 is painted anew. If it marks what stays, there is invert=True.")
    return grey


def cells(mask: Tensor, height: int, width: int) -> Tensor:
    """1 for each cell of a grid that the mask (½ or more of it) touches, however little, else 0."""
    return F.adaptive_max_pool2d((mask >= 0.5).float(), (height, width))


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """The mask with an edge that falls off linearly over so many pixels *outside* of it.

    Outside of the mask the decoder gives the old picture again, so a blend there hides the seam. With an edge
    inside, what was painted over would show through.
    """
    total = mask
    for _ in range(pixels):
        mask  = F.max_pool2d(mask, 3, stride=1, padding=1)              # one pixel more on each side
        total = total + mask
    return total / (pixels + 1)


@dataclass(frozen=True)
class Window:
    """The part of a picture that the network sees, and its size while it does.

    The `unit` of the network (8 pixels) need not divide that: what is missing below and on the right repeats
    the edge, and is cut off at the end.
    """
    box: tuple[int, int, int, int]              # top, left, bottom, right; the latter two are just outside
    size: tuple[int, int]                       # (height, width)
    unit: int

    def cut(self, pictures: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] → what the network sees of them, in multiples of the unit."""
        return self._fill(images.resize(self._crop(pictures), self.size))

    def cut_mask(self, masks: Tensor) -> Tensor:
        """The same for masks, 0 or 1 now, of which nothing gets lost, be it as thin as a hair."""
        return self._fill(cells(self._crop(masks), *self.size))

    def paste(self, painted: Tensor, pictures: Tensor, alpha: Tensor) -> Tensor:
        """Puts what came out onto the pictures, as far as alpha (N, 1, H, W) says: at 0, not a bit."""
        top, left, bottom, right = self.box
        height, width = self.size
        part   = images.resize(painted[..., :height, :width], (bottom - top, right - left))
        result = pictures.repeat(len(part) // len(pictures), 1, 1, 1)
        result[..., top:bottom, left:right] = torch.lerp(self._crop(pictures), part, self._crop(alpha))
        return result

    def _crop(self, pictures: Tensor) -> Tensor:
        top, left, bottom, right = self.box
        return pictures[..., top:bottom, left:right]

    def _fill(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[-2:]
        return F.pad(pictures, (0, -width % self.unit, 0, -height % self.unit), mode="replicate")


def window(masks: Tensor, unit: int, height: int | None, width: int | None,
           padding: int | None = None) -> Window:
    """What the network sees: at most height × width pixels (None: no limit), in the picture's proportions.

    padding: None for the whole picture, which without a limit is not scaled. A number for the part around the
        mask (all masks of the call), with so many pixels more on each side: it grows to the proportions of
        height × width as far as the picture has room, and is scaled up or down until it fills one of them.
    """
    rows, columns = (0, masks.shape[-2]), (0, masks.shape[-1])
    if padding is not None and height and width:
        touched    = (masks > SPECK).any(dim=0)[0]
        near, wide = _padded(touched.any(dim=1), padding), _padded(touched.any(dim=0), padding)
        rows    = _grown(near, (wide[1] - wide[0]) * height // width, rows[1])
        columns = _grown(wide, (near[1] - near[0]) * width // height, columns[1])
    h, w  = rows[1] - rows[0], columns[1] - columns[0]
    scale = min((limit / side for limit, side in ((height, h), (width, w)) if limit), default=1.0)
    size  = max(round(h * scale), 1), max(round(w * scale), 1)
    return Window((rows[0], columns[0], rows[1], columns[1]), size, unit)


def _padded(touched: Tensor, padding: int) -> tuple[int, int]:
    """From the first that is True to behind the last, with padding on both sides as far as there is room."""
    where = touched.nonzero()
    return max(int(where[0]) - padding, 0), min(int(where[-1]) + 1 + padding, len(touched))


def _grown(span: tuple[int, int], length: int, limit: int) -> tuple[int, int]:
    """A span grown to a length around its middle, and moved into [0, limit)."""
    low, high = span
    length = min(max(length, high - low), limit)
    low    = min(max(low - (length - (high - low)) // 2, 0), limit - length)
    return low, low + length
