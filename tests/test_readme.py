"""The Python of README runs as it stands, with the model of the package."""
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny

import ldm

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(words: str) -> str:
    found, = [code for code in BLOCKS if words in code]
    return found


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_no_block_is_forgotten():
    assert len(BLOCKS) == 4


def test_sample_and_the_parts_make_the_same_picture():
    exec(block("image, = ldm.sample(\"a red circle on a blue background\")"), {})
    short = np.asarray(PIL.Image.open("circle.png")).astype(float)
    exec(block("ldm.Denoiser("), {})
    long = np.asarray(PIL.Image.open("circle.png")).astype(float)
    assert short.shape == long.shape
    assert np.abs(short - long).max() <= 2                   # of 255 levels
    assert short.std() > 10


def test_a_scheduler_of_ones_own():
    exec(block("def my_heun"), {})
    ours = ldm.sample("a green star", scheduler=ldm.schedulers.heun, steps=10, output_type="np")[0]
    np.testing.assert_allclose(np.asarray(PIL.Image.open("star.png")) / 255, ours, atol=0.01)


def test_loading_a_stable_diffusion(tmp_path):
    code = block("stable-diffusion-v1-5/stable-diffusion-v1-5")
    _, *rest = code.splitlines()                             # the first line needs the hub
    folder = tiny.write(tmp_path / "model")
    names: dict = {"ldm": ldm}
    exec("\n".join(rest).replace("path/to/stable-diffusion-v1-5", str(folder)), names)
    assert names["image"].size == (64, 64)
