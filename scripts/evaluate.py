"""How often the embedded model draws what it was asked for, by category: python scripts/evaluate.py [KIND …]
[--count 200] [--steps 25] …

The prompts say colours, shapes, background, and where things are, in plain words; but those of one kind say
no background, which then means a white one; those of another only name a thing ("a red star"); and those of a
third only join two with "and".
On a CPU the networks are those of `ldm.fast.optimize`, which changes nothing but rounding.
`scripts/embedded/checker.py` reads the pictures. Each share has a 95 % confidence interval (Wilson 1927), as
if pictures of the same prompt were independent: with --seeds it is a little too narrow.
"""

import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent / "embedded")]

import torch
from checker import Reading, agrees, matches, read
from world import PLACES, RELATIONS, Scene, random_scene

import ldm
import ldm.fast

KINDS = ("one thing", "one thing, unseen combination", "one thing, background unsaid",
         "one thing, just named", "pair", "pair, unseen", "pair, order unsaid")
CRISP = .9             # a right outline overlaps so much with the ideal one (intersection over union) or more


def prompt_for(scene: Scene, kind: str = "") -> str:
    """A single thing with its size, pattern and place; a pair with its relation. What is judged is said,
    "medium" too: in training not every thing whose caption gave no size was medium."""
    def name(thing, sized):
        words = [thing.size if sized else "",
                 thing.texture if thing.texture != "plain" else "", thing.colour, thing.shape]
        text = " ".join(filter(None, words))
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    ground = f" on {'an' if scene.background[0] in 'aeiou' else 'a'} {scene.background} background"
    if "background unsaid" in kind:
        ground = ""
    if "just named" in kind:
        return name(scene.things[0], False)
    if len(scene.things) == 1:
        return f"{name(scene.things[0], True)} {PLACES[scene.things[0].place][0]}{ground}"
    first, second = scene.things
    relation = "and" if "order unsaid" in kind else RELATIONS[step(first, second)][0]
    return f"{name(first, False)} {relation} {name(second, False)}{ground}"


def step(first, second) -> tuple[int, int]:
    """The direction from the second thing to the first on the grid."""
    return tuple((p > q) - (p < q) for p, q in zip(first.place, second.place, strict=True))


def scenes_of(kind: str, count: int, seed: int) -> list[Scene]:
    """Plain things before plain backgrounds, which are white where prompts name none; pairs are above or
    beside each other, never diagonal."""
    rng, found = Random(seed), []
    while len(found) < count:
        scene = random_scene(rng, held_out="unseen" in kind, count=2 if "pair" in kind else 1)
        ground = not ("background unsaid" in kind or "just named" in kind) or scene.background == "white"
        if ground and (len(scene.things) == 1 or step(*scene.things) in RELATIONS):
            things = tuple(replace(thing, texture="plain") for thing in scene.things)
            found.append(Scene(things, scene.background))
    return found


def judge(scene: Scene, reading: Reading) -> dict[str, bool]:
    """What is right: by attribute for a single thing, and its outline (the outer one, holes filled); for
    pairs both things, and also in the relation that was asked for."""
    result = {"background": reading.background == scene.background}
    if len(scene.things) == 1:
        only = len(reading.things) == 1
        result |= {"colour and shape": agrees(scene, reading, "colour", "shape")}
        result |= {name: only and matches(scene.things[0], reading.things[0], name)
                   for name in ("colour", "shape", "size", "place")}
        return result | {"outline": result["shape"] and reading.things[0].likeness >= CRISP}
    both = agrees(scene, reading, "colour", "shape")
    related = False
    if both:
        first = scene.things[0]
        a, b = sorted(reading.things, key=lambda found: not matches(first, found, "colour", "shape"))
        dx, dy = step(*scene.things)
        across = (a.x - b.x, a.y - b.y)
        related = (across[0] * dx + across[1] * dy) > max(abs(across[0] * dy), abs(across[1] * dx))
    return result | {"both things": both, "both and relation": related}


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of shares that would give `right` of `count` with 95 % confidence."""
    share = right / count
    centre = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - width) / (1 + z * z / count), (centre + width) / (1 + z * z / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of prompts: {', '.join(map(repr, KINDS))}")
    parser.add_argument("--model", help="a folder; default: the embedded model")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--scheduler")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if unknown := {*args.kinds} - {*KINDS}:
        parser.error(f"no kind {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, KINDS))}")
    pipe, start, pictures = ldm.load(args.model), time.time(), 0
    if pipe.device.type == "cpu":
        pipe = ldm.fast.optimize(pipe)
    print("| prompts | what is right | share | 95 % interval |\n|---|---|---|---|")
    for kind in args.kinds or KINDS:
        scenes, counts = scenes_of(kind, args.count, seed=1_000_003) * args.seeds, Counter()
        for i in range(0, len(scenes), args.batch):
            part = scenes[i:i + args.batch]
            images = ldm.sample([prompt_for(scene, kind) for scene in part], pipe, seed=args.seed + i,
                                scheduler=args.scheduler, steps=args.steps, guidance_scale=args.guidance,
                                progress=False)
            pictures += len(images)
            for scene, image in zip(part, images, strict=True):
                counts.update({name: int(right) for name, right in judge(scene, read(image)).items()
                               if not ("order unsaid" in kind and "relation" in name
                                       or "just named" in kind and name in ("size", "place"))})
        for name, right in counts.items():
            low, high = wilson(right, len(scenes))
            print(f"| {kind} | {name} | {right / len(scenes):.1%} | {low:.1%} to {high:.1%} |", flush=True)
    several = "1 picture" if args.seeds == 1 else f"{args.seeds} pictures"
    print(f"\n{args.count} prompts of each kind, {several} of each, seeds from {args.seed}; "
          f"{(time.time() - start) / pictures:.2f} s a picture.")


if __name__ == "__main__":
    main()
