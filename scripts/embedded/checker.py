"""Reads a picture of the picture world: which objects of which colour, shape and size stand where, on which
background.

    python scripts/embedded/checker.py PICTURE [...]

Numpy and Pillow only, no learning. The background's colour is that of the border. What differs from it in
colour is cut into connected regions; a region's colour is the most frequent one inside it, its shape the
outline of `world.py` with which it overlaps best.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from world import COLOURS, GRID, SHAPES, Scene, Thing, render

SIDE = 128                     # pictures are read at this size
SMALLEST = 60                  # pixels of a region that counts as an object
SIZE_BORDERS = (.1375, .185)   # radii between small, medium and large


@dataclass(frozen=True)
class Found:
    """One object. `likeness` is the overlap (intersection over union) with the ideal outline, in [0, 1]."""
    colour: str
    shape: str
    size: str
    place: tuple[int, int]     # cell (column, row) of the 3x3 grid
    x: float
    y: float
    radius: float
    likeness: float


@dataclass(frozen=True)
class Reading:
    background: str
    things: tuple[Found, ...]


def read(picture: Image.Image) -> Reading:
    """What the picture shows, the largest object first."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    names = nearest_colours(pixels)                                    # (SIDE, SIDE) numbers of colours
    border = np.concatenate([part.ravel() for part in (names[:3], names[-3:], names[:, :3], names[:, -3:])])
    ground = int(np.bincount(border, minlength=len(COLOURS)).argmax())
    things = [_identify(region, names, ground) for region in regions(names != ground)]
    things = [thing for thing in things if thing is not None]
    return Reading(list(COLOURS)[ground], tuple(sorted(things, key=lambda thing: -thing.radius)))


def matches(thing: Thing, found: Found, *attributes: str) -> bool:
    """Whether the attributes ("colour", "shape", "size", "place") agree."""
    return all(getattr(thing, name) == getattr(found, name) for name in attributes)


def agrees(scene: Scene, reading: Reading, *attributes: str) -> bool:
    """Whether the picture shows as many things as the scene, each agreeing with another one in the
    attributes."""
    left = list(reading.things)
    for thing in scene.things:
        best = next((found for found in left if matches(thing, found, *attributes)), None)
        if best is None:
            return False
        left.remove(best)
    return not left


# ---------------------------------------------------------------------------------------------------- colours

@cache
def _palette() -> tuple[np.ndarray, np.ndarray]:
    """Every colour as the world shows it, shaded and in the second tone of its patterns: Lab values (K, 3),
    numbers (K,)."""
    shades, numbers = [], []
    for number, rgb in enumerate(COLOURS.values()):
        base = np.array(rgb, np.float32)
        lighter = [base + amount * (255 - base) for amount in (.1, .2, .28)]
        darker = [base * (1 - amount) for amount in (.1, .2)]
        shades += [base, *lighter, *darker]
        numbers += [number] * 6
    return _lab(np.array(shades)), np.array(numbers)


def nearest_colours(pixels: np.ndarray) -> np.ndarray:
    """RGB (h, w, 3) in 0 … 255 → the number of the nearest colour (h, w)."""
    shades, numbers = _palette()
    lab = _lab(pixels.reshape(-1, 3))
    distances = (lab * lab).sum(1)[:, None] - 2 * lab @ shades.T + (shades * shades).sum(1)
    return numbers[distances.argmin(1)].reshape(pixels.shape[:2])


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (N, 3) in 0 … 255 → CIE Lab, where distances are about as large as they look."""
    c = rgb / 255
    linear = np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055) ** 2.4)
    to_xyz = np.array([[.4124, .2126, .0193], [.3576, .7152, .1192], [.1805, .0722, .9505]])
    xyz = linear @ to_xyz / (.9505, 1, 1.089)
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])]
    return np.stack(lab, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- regions

def regions(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a mask, opened first (thin lines are the blends of two colours along an
    edge), large enough."""
    core = mask.copy()
    for axis in (0, 1):
        core &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    labels = np.where(core, np.arange(1, core.size + 1).reshape(core.shape), 0)
    while True:                                 # each pixel takes the largest label around it, until all have
        padded = np.pad(labels, 1)
        around = [labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        spread = np.max(around, axis=0) * core
        spread = np.where(core, np.take(np.append(0, spread.ravel()), spread), 0)  # the label at the label
        if (spread == labels).all():
            break
        labels = spread
    found = []
    for label, count in Counter(labels[core].tolist()).items():
        if count >= SMALLEST // 3:
            region = _dilate(_dilate(_dilate(labels == label) & mask) & mask) & mask
            if region.sum() >= SMALLEST:
                found.append(region)
    return found


def _dilate(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


# ----------------------------------------------------------------------------------------------------- shapes

GLYPH = 48


def _glyph(mask: np.ndarray) -> np.ndarray:
    """A mask cut to its bounds and scaled to a longer side of GLYPH pixels: (GLYPH, GLYPH) in [0, 1]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    h, w = cut.shape
    scale = GLYPH / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    image = Image.fromarray((cut * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    glyph = np.zeros((GLYPH, GLYPH), np.float32)
    top, left = (GLYPH - size[1]) // 2, (GLYPH - size[0]) // 2
    glyph[top:top + size[1], left:left + size[0]] = np.asarray(image, np.float32) / 255
    return glyph


@cache
def _templates() -> dict[str, tuple[np.ndarray, float, tuple[float, float]]]:
    """Shape → its glyph, its longer side over twice its radius, and the middle of its bounds in radii from
    its centre."""
    result = {}
    for shape in SHAPES:
        scene = Scene((Thing("black", shape, "large", "plain", (1, 1), .5, .5, .4),), "white")
        mask = np.asarray(render(scene, 400).convert("L")) < 128
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        middle = (columns[0] + columns[-1]) / 2 - 199.5, (rows[0] + rows[-1]) / 2 - 199.5
        result[shape] = _glyph(mask), extent / 320, (middle[0] / 160, middle[1] / 160)
    return result


def _identify(region: np.ndarray, names: np.ndarray, ground: int) -> Found | None:
    glyph = _glyph(region)
    overlaps = {shape: float(np.minimum(glyph, ideal).sum() / np.maximum(glyph, ideal).sum())
                for shape, (ideal, _, _) in _templates().items()}
    shape = max(overlaps, key=overlaps.__getitem__)
    votes = np.bincount(names[region], minlength=len(COLOURS))
    votes[ground] = 0
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    _, ratio, (dx, dy) = _templates()[shape]
    radius = extent / SIDE / 2 / ratio
    x = (columns[0] + columns[-1] + 1) / 2 / SIDE - dx * radius
    y = (rows[0] + rows[-1] + 1) / 2 / SIDE - dy * radius
    size = ("small", "medium", "large")[sum(radius > border for border in SIZE_BORDERS)]
    column, row = (min(range(3), key=lambda i: abs(GRID[i] - p)) for p in (x, y))
    return Found(list(COLOURS)[int(votes.argmax())], shape, size, (column, row), float(x), float(y),
                 float(radius), likeness=overlaps[shape])


if __name__ == "__main__":
    for path in sys.argv[1:]:
        reading = read(Image.open(path))
        print(f"{path}: on {reading.background}")
        for thing in reading.things:
            print(f"  {thing.size} {thing.colour} {thing.shape} at {thing.place}, likeness "
                  f"{thing.likeness:.2f}")
