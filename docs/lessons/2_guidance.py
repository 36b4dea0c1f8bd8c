"""Lesson 2. What guidance buys.    python docs/lessons/2_guidance.py

The pictures of the small model can be judged by a program, so a question about guidance is answered by
counting. The prompts are hard ones for it: two things joined by "and", and nothing said of where they are. In
how many pictures are both, in their colours and their shapes?
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "scripts" / folder) for folder in ("", "embedded")]

from checker import read
from evaluate import judge, prompt_for, scenes_of

import ldm

pipe    = ldm.load(device="cpu")
kind    = "pair, order unsaid"
scenes  = scenes_of(kind, 12, seed=7)
prompts = [prompt_for(scene, kind) for scene in scenes]
print("scale   right")
right = {}
for scale in (1, 3, 8):
    pictures     = ldm.sample(prompts, pipe, steps=10, guidance_scale=scale)
    right[scale] = sum(judge(scene, read(picture))["both things"]
                       for scene, picture in zip(scenes, pictures, strict=True))
    print(f"{scale:5}   {right[scale]:2} of {len(scenes)}")

# Without guidance (scale 1) the network gives things that go with the text, but not always these. A scale
# of 3 leads to what was asked for. More is not better. Twelve prompts are few: `python scripts/evaluate.py
# --guidance 3` asks hundreds, and prints how certain the answer is.
