"""Lesson 2. What guidance buys.    python docs/lessons/2_guidance.py

The pictures of the small model can be judged by a program, so a question about guidance is answered by
counting: in how many is there the one thing that the prompt asks for, in its colour and its shape?
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "scripts" / folder) for folder in ("", "embedded")]

from checker import read
from evaluate import judge, prompt_for, scenes_of

import ldm

pipe   = ldm.load(device="cpu")
scenes = scenes_of("one thing", 12, seed=7)
print("scale   right")
right = {}
for scale in (1, 3, 8):
    pictures     = ldm.sample([prompt_for(scene) for scene in scenes], pipe, steps=10, guidance_scale=scale)
    right[scale] = sum(judge(scene, read(picture))["colour and shape"]
                       for scene, picture in zip(scenes, pictures, strict=True))
    print(f"{scale:5}   {right[scale]:2} of {len(scenes)}")

# Without guidance (scale 1) the network gives things that go with the text, but not always the thing. A scale
# of 3 leads to what was asked for. More is not better. Twelve prompts are few: `python scripts/evaluate.py
# --guidance 3` asks hundreds, and prints how certain the answer is.
