"""What the parts of the embedded model could do at best: python scripts/embedded/limits.py [--model FOLDER]

Of what `scripts/evaluate.py` finds wrong, how much can the U-Net not be blamed for? In the same scenes, the
share that is right
- when the checker reads the rendered scene itself: errors of the checker;
- when the scene goes through the autoencoder first: what its latents cannot hold; also with latents a fifth
  too weak or too strong, as guidance may leave them;
- when a small reader says what the caption means. It looks once at the states of the text encoder, as a
  cross-attention does, and was trained on captions of the combinations that the training set has. If it fails
  on the others, the states do not say what the caption says.
"""
import argparse
import sys
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch
import torch.nn.functional as F
from checker import read
from common import pixels
from evaluate import judge, scenes_of
from torch import Tensor
from train_text import SceneReader, answers, plain_caption, plainly
from world import Scene, random_scene

import ldm
from ldm import images

KINDS = {"one thing": (1, False), "one thing, unseen combination": (1, True),
         "pair": (2, False), "pair, unseen": (2, True)}
ASKED = "shape", "colour"


@torch.no_grad()
def seen_right(pipe: ldm.Pipeline, scenes: list[Scene], strength: float | None) -> float:
    """The share of scenes whose picture, or what the autoencoder makes of it with latents times `strength`
    (None: the picture itself), the checker reads rightly."""
    right = 0
    for i in range(0, len(scenes), 10):
        part = scenes[i:i + 10]
        x = pixels(part, pipe.defaults.height)
        if strength is not None:
            x = pipe.vae.decode(strength * pipe.vae.encode(x)[0])
        for scene, image in zip(part, images.to_pil(images.to_unit(x)), strict=True):
            found = judge(scene, read(image))
            right += found["colour and shape" if len(scene.things) == 1 else "both things"]
    return right / len(scenes)


def plain_scenes(rng: Random, count: int, things: int, unseen: bool) -> list[Scene]:
    """Scenes of which `plain_caption` says all that the reader is asked."""
    found: list[Scene] = []
    while len(found) < count:
        found += filter(plainly, [random_scene(rng, unseen, things)])
    return found


@torch.no_grad()
def states(pipe: ldm.Pipeline, scenes: list[Scene]) -> Tensor:
    """(N, S, D): what the text encoder says of the scenes' plain captions."""
    captions = list(map(plain_caption, scenes))
    return torch.cat([pipe.text(captions[i:i + 100]).context for i in range(0, len(captions), 100)])


def trained_reader(pipe: ldm.Pipeline, count: int, steps: int) -> SceneReader:
    """A reader of the frozen states of `count` seen scenes with one thing, and as many with two."""
    rng    = Random(1)
    scenes = [scene for things in (1, 2) for scene in plain_scenes(rng, count, things, unseen=False)]
    known, right = states(pipe, scenes), answers(scenes)
    torch.manual_seed(0)
    reader    = SceneReader()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(scenes), (128,))
        found  = reader(known[chosen])
        loss   = sum(F.cross_entropy(found[name].flatten(0, -2), right[name][chosen].flatten())
                     for name in ASKED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return reader


@torch.no_grad()
def read_right(pipe: ldm.Pipeline, reader: SceneReader, scenes: list[Scene]) -> float:
    """The share of captions of which the reader says colours and shapes at all places rightly."""
    found, right = reader(states(pipe, scenes)), answers(scenes)
    wrong = [(found[name].argmax(-1) != right[name]).any(1) for name in ASKED]
    return 1 - float(torch.stack(wrong).any(0).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: the embedded model")
    parser.add_argument("--count", type=int, default=200, help="scenes of each kind")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the reader")
    args = parser.parse_args()
    pipe = ldm.load(args.model, device="cpu", dtype="float32")
    reader = trained_reader(pipe, 2000, args.steps)
    rows: dict[str, list[float]] = {}
    for kind, (things, unseen) in KINDS.items():
        scenes = scenes_of(kind, args.count, seed=1_000_003)
        spoken = plain_scenes(Random(2), args.count, things, unseen)
        for name, share in (("the checker, on the rendered scene", seen_right(pipe, scenes, None)),
                            ("through the autoencoder", seen_right(pipe, scenes, 1.)),
                            ("its latents a fifth too weak", seen_right(pipe, scenes, .8)),
                            ("its latents a fifth too strong", seen_right(pipe, scenes, 1.2)),
                            ("the text encoder, read by a small reader", read_right(pipe, reader, spoken))):
            rows.setdefault(name, []).append(share)
    print("| at best | " + " | ".join(KINDS) + " |\n|---|" + "---|" * len(KINDS))
    for name, shares in rows.items():
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    print(f"\n{args.count} scenes of each kind.")


if __name__ == "__main__":
    main()
