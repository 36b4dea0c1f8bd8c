"""The picture world of the embedded model: scenes of one or two coloured shapes, their pictures and their
captions.

A `Scene` says everything that a picture shows; `render` draws it, `caption` describes it in plain English
(never everything, and never twice in the same words), `random_scene` draws one at random. What the model must
never see in training is `HELD_OUT`.

Lengths and positions are fractions of the picture's side, x to the right, y down. A place is a cell (column,
row) of a 3x3 grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (212, 36, 44),  "orange": (245, 134, 28),  "yellow": (250, 214, 44), "green": (44, 156, 68),
    "blue": (40, 88, 206), "purple": (130, 54, 172),  "pink": (246, 150, 190),  "white": (247, 247, 245),
    "black": (26, 26, 30), "gray": (140, 142, 148),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
MORE_SHAPES = ("pentagon", "hexagon", "oval", "arrow", "cloud", "leaf", "crown")     # for variety: not judged
SIZES = {"small": (.105, .125), "medium": (.15, .17), "large": (.20, .215)}        # radius, from … to
LARGE_ALONE = (.20, .27)                                                       # a single object has more room
TEXTURES = ("plain", "shaded", "striped", "dotted")
GRID = (.26, .5, .74)                                                  # centres of the three columns and rows

# Never drawn in training: objects of these colours and shapes, and these pairs (in any order and relation).
HELD_OUT = {
    "combinations": {("green", "star"), ("purple", "circle"), ("orange", "cross"), ("pink", "triangle"),
                     ("blue", "diamond"), ("yellow", "ring"), ("black", "heart"), ("gray", "square")},
    "pairs": {frozenset(pair) for pair in [
        (("red", "circle"), ("green", "square")),    (("blue", "star"), ("yellow", "circle")),
        (("orange", "triangle"), ("purple", "ring")), (("white", "cross"), ("red", "diamond")),
        (("pink", "heart"), ("green", "circle")),    (("black", "triangle"), ("yellow", "square")),
        (("purple", "diamond"), ("orange", "star")), (("gray", "ring"), ("blue", "heart")),
        (("green", "cross"), ("pink", "star")),      (("yellow", "triangle"), ("black", "circle")),
        (("red", "ring"), ("white", "square")),      (("blue", "cross"), ("orange", "heart")),
    ]},
}


@dataclass(frozen=True)
class Thing:
    """One object: what it is, the grid cell where it belongs, and its exact centre and radius."""
    colour: str
    shape: str
    size: str
    texture: str
    place: tuple[int, int]
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two things before a background."""
    things: tuple[Thing, ...]
    background: str
    backdrop: str = "plain"        # the background's texture


# ----------------------------------------------------------------------------------------------------- scenes

def random_scene(rng: Random, held_out: bool = False, count: int | None = None,
                 colours: Sequence[str] = tuple(COLOURS), shapes: Sequence[str] = SHAPES) -> Scene:
    """A scene with one or two things (`count`; by itself two in 70 % of the cases).

    held_out=True draws from what training never sees: one thing of a held-out combination, or a held-out
    pair. `shapes` may have `MORE_SHAPES`; a scene of colours other than the world's has a caption, but no
    picture.
    """
    count = count or (2 if rng.random() < .7 else 1)
    while True:
        kinds = _held_out_kinds(rng, count) if held_out else [
            (rng.choice(colours), rng.choice(shapes)) for _ in range(count)]
        if len(set(kinds)) == count and (held_out or not is_held_out(kinds)):
            break
    taken = {colour for colour, _ in kinds}
    free = [colour for colour in colours if colour not in taken]
    background = "white" if "white" in free and rng.random() < .15 else rng.choice(free)
    backdrop = rng.choices(("plain", "shaded", "striped", "dotted"), (64, 24, 6, 6))[0]
    things = tuple(_thing(rng, *kind, place, alone=count == 1)
                   for kind, place in zip(kinds, _places(rng, count), strict=True))
    return Scene(things, background, backdrop)


def is_held_out(kinds: list[tuple[str, str]]) -> bool:
    """Whether these (colour, shape) kinds contain a held-out combination or are a held-out pair."""
    return any(kind in HELD_OUT["combinations"] for kind in kinds) or frozenset(kinds) in HELD_OUT["pairs"]


def _held_out_kinds(rng: Random, count: int) -> list[tuple[str, str]]:
    if count == 1:
        return [rng.choice(sorted(HELD_OUT["combinations"]))]
    pair = sorted(rng.choice(sorted(HELD_OUT["pairs"], key=sorted)))
    return rng.sample(pair, 2)


def _places(rng: Random, count: int) -> list[tuple[int, int]]:
    if count == 1:
        return [(1, 1) if rng.random() < .5 else (rng.randrange(3), rng.randrange(3))]
    axis = rng.choices(("row", "column", "diagonal"), (43, 43, 14))[0]
    if axis == "row":
        places = [(0, 1), (2, 1)]
    elif axis == "column":
        places = [(1, 0), (1, 2)]
    else:
        places = [(0, 0), (2, 2)] if rng.random() < .5 else [(2, 0), (0, 2)]
    return rng.sample(places, 2)


def _thing(rng: Random, colour: str, shape: str, place: tuple[int, int], alone: bool) -> Thing:
    size = rng.choices(("small", "medium", "large"), (30, 40, 30))[0]
    radius = rng.uniform(*(LARGE_ALONE if alone and size == "large" else SIZES[size]))
    x, y = (min(max(GRID[i] + rng.uniform(-.02, .02), radius + .03), .97 - radius) for i in place)
    return Thing(colour, shape, size, rng.choices(TEXTURES, (58, 22, 10, 10))[0], place, x, y, radius)


# --------------------------------------------------------------------------------------------------- pictures

OVERSAMPLING = 4


def render(scene: Scene, size: int = 256) -> Image.Image:
    """The scene as an RGB picture of size x size pixels, with smooth edges."""
    centres = (np.arange(size, dtype=np.float32) + .5) / size
    x, y = centres[None, :], centres[:, None]
    canvas = _fill(scene.background, scene.backdrop, x, y, .5, .5, .7).copy()
    for thing in scene.things:
        left, top = (max(0, int((c - thing.radius) * size) - 1) for c in (thing.x, thing.y))
        side = math.ceil(2 * thing.radius * size) + 3
        window = np.s_[top:top + side, left:left + side]
        fill = _fill(thing.colour, thing.texture, x[:, left:left + side], y[top:top + side],
                     thing.x, thing.y, thing.radius)
        height, width, _ = fill.shape
        cover = _coverage(thing, size, left, top, side)[:height, :width, None]
        canvas[window] += cover * (fill - canvas[window])
    return Image.fromarray((canvas * 255 + .5).astype(np.uint8))


def _fill(colour: str, texture: str, x, y, x0: float, y0: float, radius: float) -> np.ndarray:
    """Colours (h, w, 3) in [0, 1] over the points x (1, w), y (h, 1) of what lies around (x0, y0)."""
    base = np.array(COLOURS[colour], np.float32) / 255
    light = base @ (.3, .6, .1) > .6
    other = base * .78 if light else base + .26 * (1 - base)        # the second tone of a pattern
    if texture == "shaded":                                            # light falls from the upper left
        slope = np.clip(((x - x0) + (y - y0)) / (2 * radius), -1, 1)[..., None]
        lit = np.where(slope < 0, base - .3 * slope * (1 - base), base * (1 - .22 * slope))
        return lit.astype(np.float32)
    if texture == "striped":
        wave = np.cos(2 * math.pi * ((x - x0) + (y - y0)) / .13)
        blend = np.clip(.5 + 4 * wave, 0, 1)[..., None]
    elif texture == "dotted":
        pitch = .1
        u, v = (np.mod(p - p0 + pitch / 2, pitch) - pitch / 2 for p, p0 in ((x, x0), (y, y0)))
        blend = np.clip((.030 - np.sqrt(u * u + v * v)) * 200 + .5, 0, 1)[..., None]
    else:
        return np.broadcast_to(base, (y.shape[0], x.shape[1], 3))
    return (base + blend * (other - base)).astype(np.float32)


def _coverage(thing: Thing, size: int, left: int, top: int, side: int) -> np.ndarray:
    """How much of each pixel of the window the thing covers: (side, side) in [0, 1]."""
    scale = size * OVERSAMPLING
    mask = Image.new("L", (side * OVERSAMPLING,) * 2)
    pen = ImageDraw.Draw(mask)
    for polygon, value in outline(thing.shape):
        points = [((thing.x + thing.radius * u) * scale - left * OVERSAMPLING - .5,
                   (thing.y + thing.radius * v) * scale - top * OVERSAMPLING - .5) for u, v in polygon]
        pen.polygon(points, fill=value)
    return np.asarray(mask.reduce(OVERSAMPLING), np.float32) / 255


def outline(shape: str) -> list[tuple[list[tuple[float, float]], int]]:
    """The shape of radius 1 around (0, 0) as polygons, to be filled one after the other with 255 (ink) or 0
    (hole)."""
    turn = [2 * math.pi * i / 72 for i in range(72)]
    def ellipse(width: float, height: float, x: float = 0, y: float = 0) -> list[tuple[float, float]]:
        return [(x + width * math.cos(a), y + height * math.sin(a)) for a in turn]
    if shape == "circle":
        return [(ellipse(.95, .95), 255)]
    if shape == "ring":
        return [(ellipse(.98, .98), 255), (ellipse(.54, .54), 0)]
    if shape == "square":
        return [([(-.84, -.84), (.84, -.84), (.84, .84), (-.84, .84)], 255)]
    if shape == "diamond":
        return [([(0, -1), (.74, 0), (0, 1), (-.74, 0)], 255)]
    if shape == "triangle":
        return [([(0, -.92), (1, .82), (-1, .82)], 255)]
    if shape == "star":
        radii = [(1.04 if i % 2 == 0 else .44, math.pi * (i / 5 - .5)) for i in range(10)]
        return [([(r * math.cos(a), .06 + r * math.sin(a)) for r, a in radii], 255)]
    if shape == "cross":
        w = .32
        return [([(-w, -.95), (w, -.95), (w, -w), (.95, -w), (.95, w), (w, w), (w, .95), (-w, .95), (-w, w),
                  (-.95, w), (-.95, -w), (-w, -w)], 255)]
    if shape == "heart":
        height = (13, -5, -2, -1)                                           # the cosines of the "heart curve"
        return [([(math.sin(a) ** 3, -sum(c * math.cos((k + 1) * a) for k, c in enumerate(height)) / 16 - .12)
                  for a in turn], 255)]
    if shape in ("pentagon", "hexagon"):
        corners = 5 if shape == "pentagon" else 6
        turns = [2 * math.pi * (i / corners - .25) for i in range(corners)]
        return [([(math.cos(a), math.sin(a)) for a in turns], 255)]
    if shape == "oval":
        return [(ellipse(.98, .6), 255)]
    if shape == "arrow":
        return [([(-.95, -.28), (.1, -.28), (.1, -.75), (.98, 0), (.1, .75), (.1, .28), (-.95, .28)], 255)]
    if shape == "cloud":
        return [([(-.55, .2), (.52, .2), (.52, .61), (-.55, .63)], 255), (ellipse(.43, .43, -.55, .2), 255),
                (ellipse(.55, .55, -.05, -.1), 255), (ellipse(.46, .46, .52, .15), 255)]
    if shape == "leaf":                                           # two arcs from corner to corner
        arc = [(i / 18 - 1, .42 * (1 - (i / 18 - 1) ** 2)) for i in range(37)]
        lens = arc + [(u, -v) for u, v in reversed(arc)]
        return [([(.72 * (u + v), .72 * (v - u)) for u, v in lens], 255)]
    if shape == "crown":
        return [([(-.95, .75), (-.95, -.6), (-.45, .05), (0, -.8), (.45, .05), (.95, -.6), (.95, .75)], 255)]
    raise ValueError(f"no shape named {shape!r}; there are {', '.join(SHAPES + MORE_SHAPES)}")


# --------------------------------------------------------------------------------------------------- captions

NOUNS = {
    "":         ("shape", "thing", "object"),
    "circle":   ("circle", "circle", "circle", "disc", "disk"),
    "square":   ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star":     ("star", "star", "five-pointed star"),
    "ring":     ("ring", "ring", "ring", "hoop", "donut"),
    "heart":    ("heart", "heart", "heart shape"),
    "cross":    ("cross", "cross", "cross", "plus", "plus sign"),
    "diamond":  ("diamond", "diamond", "diamond", "rhombus"),
}
COLOUR_WORDS = {"purple": ("purple", "purple", "violet"), "gray": ("gray", "grey")}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "medium": ("medium", "medium-sized"),
              "large": ("large", "big", "large", "huge")}
ADJECTIVES = {"striped": ("striped", "stripy"), "dotted": ("dotted", "spotted"),
              "shaded": ("shaded", "shiny")}
TAILS = {"striped": "with stripes", "dotted": "with dots", "shaded": "with shading"}
OPENINGS = ("",) * 10 + (
    "a picture of", "a picture of", "an image of", "a drawing of", "an illustration of", "a photo of",
    "there is", "this is", "we see", "show me", "draw", "please draw", "a picture with",
    "a simple picture of", "a painting of", "I want", "a beautiful", "here is")
RELATIONS = {                        # what stands between the first thing and the second, seen from the first
    (0, -1): ("above", "above", "over", "on top of", "higher than", "directly above", "up above"),
    (0, 1):  ("below", "below", "under", "beneath", "underneath", "lower than"),
    (-1, 0): ("to the left of", "left of", "on the left of", "on the left side of"),
    (1, 0):  ("to the right of", "right of", "on the right of", "on the right side of"),
}
AFTERWARDS = {                               # "a star and … a ring": where the second is, when the first is …
    (0, -1): ("below it", "under it", "beneath it", "underneath it"),
    (0, 1):  ("above it", "over it", "on top of it"),
    (-1, 0): ("to the right of it", "on its right", "to its right"),
    (1, 0):  ("to the left of it", "on its left", "to its left"),
}
PLACES = {
    (1, 1): ("in the middle", "in the center", "at the center", "in the centre"),
    (1, 0): ("at the top", "at the top", "in the upper part", "up at the top"),
    (1, 2): ("at the bottom", "at the bottom", "in the lower part", "down at the bottom"),
    (0, 1): ("on the left", "at the left", "on the left side"),
    (2, 1): ("on the right", "at the right", "on the right side"),
    (0, 0): ("at the top left", "at the upper left", "in the top left corner",
             "in the upper left corner"),
    (2, 0): ("at the top right", "at the upper right", "in the top right corner",
             "in the upper right corner"),
    (0, 2): ("at the bottom left", "at the lower left", "in the bottom left corner",
             "in the lower left corner"),
    (2, 2): ("at the bottom right", "at the lower right", "in the bottom right corner",
             "in the lower right corner"),
}


def forget(scene: Scene, rng: Random) -> Scene:
    """The scene with some colours and shapes left blank (""), which a caption then does not say."""
    return replace(scene, things=tuple(
        replace(thing, colour="" if rng.random() < .07 else thing.colour,
                shape="" if rng.random() < .06 else thing.shape) for thing in scene.things))


def caption(scene: Scene, rng: Random) -> str:
    """The scene in words; leaves sizes, textures, places and the background out at random.

    What is left unsaid has a meaning: a plain white background (behind a white thing some other), the middle
    of the picture, and in four of five cases a medium thing. Two things without an order stand side by side,
    in the order of their names. (If a thing may be anywhere, a model has to decide, and may decide for two
    places at once, or for the same thing in both.)
    """
    phrases = [_phrase(thing, rng) for thing in scene.things]
    order = rng.sample(range(len(phrases)), len(phrases))
    text = _alone(scene.things[0], phrases[0], rng) if len(phrases) == 1 else \
        _together(*(scene.things[i] for i in order), *(phrases[i] for i in order), rng)
    ground = _background(scene, rng)
    if ground and rng.random() < .15:
        text = rng.choice((f"{ground}, {text}", f"{ground} {text}",
                           f"{ground.removeprefix('on ')} with {text}"))
    elif ground:
        text = f"{text}{rng.choice(('', '', '', ','))} {ground}"
    opening = rng.choice(OPENINGS)
    if opening == "a beautiful":
        text = text.removeprefix("a ").removeprefix("an ")
    text = f"{opening} {text}".strip()
    if rng.random() < .15:                                          # as in telegrams: red star above blue box
        text = text.replace("a ", "").replace("an ", "").replace("the ", "")
    if rng.random() < .15:
        text = text[0].upper() + text[1:] + rng.choice((".", "", "!"))
    return text


def _phrase(thing: Thing, rng: Random) -> str:
    colour = rng.choice(COLOUR_WORDS.get(thing.colour, (thing.colour,)))
    noun = rng.choice(NOUNS.get(thing.shape, (thing.shape,)))
    said = rng.random() < (.2 if thing.size == "medium" else .9)
    words = [rng.choice(SIZE_WORDS[thing.size])] if said else []
    tail = ""
    if thing.texture == "plain" and rng.random() < .05:
        words.append("plain")
    elif thing.texture in ("striped", "dotted") or (thing.texture == "shaded" and rng.random() < .25):
        if rng.random() < .35:
            tail = " " + TAILS[thing.texture]
        else:
            words.append(rng.choice(ADJECTIVES[thing.texture]))
    if rng.random() < .2:
        rng.shuffle(words)
    if colour and rng.random() < .06:
        link = rng.choice(("that is", "coloured", "colored", "in"))
        return f"{_article(' '.join([*words, noun]))}{tail} {link} {colour}"
    words.insert(rng.randrange(len(words) + 1) if rng.random() < .15 else len(words), colour)
    return _article(" ".join(filter(None, [*words, noun]))) + tail


def _alone(thing: Thing, phrase: str, rng: Random) -> str:
    if thing.place == (1, 1) and rng.random() < .65:
        return phrase
    place = rng.choice(PLACES[thing.place])
    return f"{place}{rng.choice(('', ','))} {phrase}" if rng.random() < .15 else f"{phrase} {place}"


def _together(first: Thing, second: Thing, a: str, b: str, rng: Random) -> str:
    step = tuple((p > q) - (p < q) for p, q in zip(first.place, second.place, strict=True))
    if step[1] == 0 and rng.random() < .45:                        # side by side: no order said
        if first.place > second.place:
            a, b = b, a
        return f"{a}{rng.choice((' and', ' next to', ',', ' with', ' together with'))} {b}"
    style = rng.random()
    if step not in RELATIONS or style < .16:                                                          # places
        here, there = rng.choice(PLACES[first.place]), rng.choice(PLACES[second.place])
        if rng.random() < .2:
            return f"{here} {a} and {there} {b}"
        return f"{a} {here}{rng.choice((' and', ',', ', and', ' with'))} {b} {there}"
    if style < .32:
        after = rng.choice(AFTERWARDS[step])
        return rng.choice((f"{a} and {b} {after}", f"{a} with {b} {after}", f"{a}, {after} {b}",
                           f"{a} and {after} {b}"))
    if style < .44:
        verb = rng.choice(("is", "placed", "sitting", "that is", "which is", "positioned"))
        return f"{a} {verb} {rng.choice(RELATIONS[step])} {b}"
    return f"{a} {rng.choice(RELATIONS[step])} {b}"


def _background(scene: Scene, rng: Random) -> str:
    white_things = any(thing.colour == "white" for thing in scene.things)      # no white behind them to mean
    unsaid = .2 if white_things else .6 if scene.background == "white" else 0
    if scene.backdrop == "plain" and rng.random() < unsaid:
        return ""
    words = [rng.choice(COLOUR_WORDS.get(scene.background, (scene.background,)))]
    if scene.backdrop in ("striped", "dotted"):
        words.insert(rng.randrange(2), rng.choice(ADJECTIVES[scene.backdrop]))
    elif scene.backdrop == "shaded" and rng.random() < .4:
        words.insert(rng.randrange(2), rng.choice(("gradient", "shaded")))
    elif scene.backdrop == "plain" and rng.random() < .1:
        words.insert(0, rng.choice(("plain", "solid")))
    colour = " ".join(words)
    return rng.choice((f"on {_article(colour)} background",) * 6 + (
        f"against {_article(colour)} background", f"in front of {_article(colour)} background",
        f"with {_article(colour)} background", f"on {_article(colour)} backdrop",
        f"before {_article(colour)} background", f"on {colour}", f"{colour} background",
        f"over {_article(colour)} background", f"the background is {colour}"))


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
