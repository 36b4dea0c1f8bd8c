"""Reads a picture of the picture world: which objects of which colour, shape and size stand where, on which
background.

    python scripts/embedded/checker.py PICTURE [...]

Numpy and Pillow only, no learning. The background's colour is that of the border. What differs from it in
colour is cut into connected regions; a region's colour is the most frequent one inside it, its shape the
outline of `world.py` with which it overlaps best, and a ring if there is a hole in it.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
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

GLYPH = 48                     # pixels of a glyph's side
REACH = 1.2                    # from a glyph's middle to its border, in roots of the shape's area
HOLE = .1                      # of what the outline encloses; a ring's is .30


@dataclass(frozen=True)
class Outline:
    """What a region or an ideal shape covers, holes filled. Two outlines are compared with their centres of
    mass and their areas made equal: a corner that sticks out moves those less than it moves the bounds."""
    glyph: np.ndarray          # (GLYPH, GLYPH) in [0, 1]
    x: float                   # the centre of mass, in pixels
    y: float
    root: float                # of the area, in pixels
    hole: bool


def _outline(mask: np.ndarray) -> Outline:
    full = _filled(mask)
    rows, columns = np.nonzero(full)
    x, y, root = float(columns.mean()) + .5, float(rows.mean()) + .5, float(full.sum()) ** .5
    pad, half = len(mask), REACH * root                              # the glyph may reach beyond the picture
    box = x + pad - half, y + pad - half, x + pad + half, y + pad + half
    image = Image.fromarray((np.pad(full, pad) * 255).astype(np.uint8))
    glyph = image.resize((GLYPH, GLYPH), Image.Resampling.BILINEAR, box=box)
    return Outline(np.asarray(glyph, np.float32) / 255, x, y, root, 1 - mask.sum() / full.sum() > HOLE)


def _filled(mask: np.ndarray) -> np.ndarray:
    """The mask without its holes: all that cannot be reached from beyond the picture."""
    free = np.pad(~mask, 1, constant_values=True)
    outside = np.zeros_like(free)
    outside[0] = outside[-1] = outside[:, 0] = outside[:, -1] = True
    while True:
        spread = _dilate(outside) & free
        if (spread == outside).all():
            return ~outside[1:-1, 1:-1]
        outside = spread


@cache
def _ideals() -> dict[str, Outline]:
    """Each shape, with its centre and the root of its area in radii, the centre from that of the shape."""
    result = {}
    for shape in SHAPES:
        side, radius = 400, 160                                                             # in pixels
        scene = Scene((Thing("black", shape, "large", "plain", (1, 1), .5, .5, radius / side),), "white")
        ideal = _outline(np.asarray(render(scene, side).convert("L")) < 128)
        result[shape] = replace(ideal, x=(ideal.x - side / 2) / radius, y=(ideal.y - side / 2) / radius,
                                root=ideal.root / radius)
    return result


def _identify(region: np.ndarray, names: np.ndarray, ground: int) -> Found:
    outline = _outline(region)
    overlaps = {shape: float(np.minimum(outline.glyph, ideal.glyph).sum() /
                             np.maximum(outline.glyph, ideal.glyph).sum())
                for shape, ideal in _ideals().items() if ideal.hole == outline.hole}
    shape = max(overlaps, key=overlaps.__getitem__)
    votes = np.bincount(names[region], minlength=len(COLOURS))
    votes[ground] = 0
    ideal = _ideals()[shape]
    radius = outline.root / ideal.root / SIDE
    x, y = outline.x / SIDE - ideal.x * radius, outline.y / SIDE - ideal.y * radius
    size = ("small", "medium", "large")[sum(radius > border for border in SIZE_BORDERS)]
    column, row = (min(range(3), key=lambda i: abs(GRID[i] - p)) for p in (x, y))
    return Found(list(COLOURS)[int(votes.argmax())], shape, size, (column, row), x, y, radius,
                 likeness=overlaps[shape])


if __name__ == "__main__":
    for path in sys.argv[1:]:
        reading = read(Image.open(path))
        print(f"{path}: on {reading.background}")
        for thing in reading.things:
            print(f"  {thing.size} {thing.colour} {thing.shape} at {thing.place}, likeness "
                  f"{thing.likeness:.2f}")
