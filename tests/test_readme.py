"""The Python of README runs as it stands, with the model of the package."""
import re
from pathlib import Path

import diffusers
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
    assert len(BLOCKS) == 5


def test_the_sizes_of_both_libraries():
    def lines(package) -> int:
        files = Path(package.__file__).parent.rglob("*.py")
        return sum(len(path.read_text("utf-8").splitlines()) for path in files)
    ours, theirs, version = re.search(r"about ([\d,]+) lines \| ([\d,]+) lines \(([\d.]+)\)", README).groups()
    assert lines(ldm) == pytest.approx(int(ours.replace(",", "")), rel=.05)
    if diffusers.__version__ == version:
        assert lines(diffusers) == pytest.approx(int(theirs.replace(",", "")), rel=.001)


def test_sample_and_the_parts_make_the_same_picture():
    exec(block("image, = ldm.sample(\"a red circle on a blue background\")"), {})
    short = np.asarray(PIL.Image.open("circle.png")).astype(float)
    exec(block("ldm.Denoiser("), {})
    long = np.asarray(PIL.Image.open("circle.png")).astype(float)
    assert short.shape == long.shape
    assert np.abs(short - long).max() <= 2                   # of 255 levels
    assert short.std() > 10


def test_the_other_tasks_start_from_a_picture():
    names: dict = {}
    exec(block("image, = ldm.sample(\"a red circle on a blue background\")"), names)
    exec(block("ldm.inpaint("), names)
    before, star, heart = (np.asarray(names[name]).astype(int) for name in ("image", "star", "heart"))
    assert np.abs(star - before).mean() > 1
    kept = np.asarray(names["mask"]) == 0
    assert np.abs(heart - before)[~kept].mean() > 1
    assert np.array_equal(heart[kept], before[kept])


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
