"""Makes every picture of README and docs again: python scripts/figures.py"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ldm
from ldm import images

IMAGES  = ROOT / "docs" / "images"
PROMPTS = [
    "a red circle on a blue background",
    "a yellow star on a black background",
    "a large green heart",
    "a small purple square on a white background",
    "a red square above a blue circle",
    "a blue circle above a red square",
    "a white triangle to the left of a pink ring on a gray background",
    "an orange diamond at the top left on a white background",
]


def shapes(pipe: ldm.Pipeline) -> None:
    """The sheet at the head of README: eight prompts, the seeds 0 to 7, nothing picked."""
    images.grid(ldm.sample(PROMPTS, pipe, seed=0), columns=4).save(IMAGES / "shapes.png")


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    shapes(ldm.load(device="cpu"))
