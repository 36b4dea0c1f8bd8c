"""At which levels of noise do outlines go wrong? python scripts/embedded/outlines.py [--model FOLDER]

Pictures of scenes get the noise of a level, and `ldm.img2img` takes it away again, told by the prompts of
`scripts/evaluate.py` what was there. What the noise hid has to be drawn; the rest only needs to be kept.
Prints, for each strength, how many things have the right outline (that of `evaluate.py`, of the right shape),
and their mean overlap with the ideal one, 0 where the shape is wrong; and then both for each shape. The first
row is of the rendered pictures themselves, a strength of 0 is the autoencoder alone, and at 1 nothing of the
picture is left.
"""
import argparse
import sys
from pathlib import Path
from statistics import fmean

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch
from checker import read
from evaluate import CRISP, judge, prompt_for, scenes_of, wilson
from world import SHAPES, Scene, render

import ldm
import ldm.fast

STRENGTHS = None, 0., .08, .2, .4, .6, .8, 1.
BATCH = 20


def likenesses(pipe: ldm.Pipeline, scenes: list[Scene], strength: float | None,
               steps: int | None = None) -> list[float]:
    """The overlap of each scene's outline with the ideal one, 0 where the shape is wrong, after noise and
    sampling; strength None: without either. `steps` are those of a whole run, None the model's own."""
    found = []
    for i in range(0, len(scenes), BATCH):
        part  = scenes[i:i + BATCH]
        drawn = [render(scene, pipe.defaults.height) for scene in part]
        if strength is not None:
            drawn = ldm.img2img([prompt_for(scene) for scene in part], drawn, pipe, strength=strength,
                                steps=steps, seed=i, progress=False)
        for scene, image in zip(part, drawn, strict=True):
            reading = read(image)
            found.append(reading.things[0].likeness if judge(scene, reading)["shape"] else 0.)
    return found


def by_shape(overlaps: dict[str, list[float]], scenes: list[Scene]) -> str:
    """A table of the shapes: how many outlines are right, and their mean overlap."""
    lines = [f"| right, and mean overlap | {' | '.join(overlaps)} |", f"|---|{'---|' * len(overlaps)}"]
    for shape in SHAPES:
        own = [i for i, scene in enumerate(scenes) if scene.things[0].shape == shape]
        if own:
            each  = [[found[i] for i in own] for found in overlaps.values()]
            cells = [f"{sum(one >= CRISP for one in some)}, {fmean(some):.3f}" for some in each]
            lines.append(f"| {len(own)} × {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: the embedded model")
    parser.add_argument("--count", type=int, default=100, help="scenes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe   = ldm.fast.optimize(ldm.load(args.model, device="cpu"))
    scenes = scenes_of("one thing", args.count, seed=1_000_003)
    print("| strength | outlines right | 95 % interval | mean overlap |\n|---|---|---|---|")
    found = {}
    for strength in STRENGTHS:
        name = "rendered" if strength is None else f"{strength:g}"
        found[name] = likenesses(pipe, scenes, strength)
        right       = sum(one >= CRISP for one in found[name])
        low, high   = wilson(right, len(scenes))
        print(f"| {name} | {right / len(scenes):.1%} | {low:.1%} to {high:.1%} | {fmean(found[name]):.3f} |",
              flush=True)
    print(f"\n{by_shape(found, scenes)}")
    print(f"\n{args.count} scenes of one thing, {pipe.defaults.steps} steps in a whole run.")


if __name__ == "__main__":
    main()
