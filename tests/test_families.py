"""Every family × every task, end to end beside diffusers: of the same weights and seeds the same pictures."""
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny

import ldm

SEEDS = [5, 9]
PAGE  = Path(__file__).parent.parent / "docs/families.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.write(root / name, family, **more) for name, (family, more) in {
        "SD 1.5":       ("SD 1.5", {}),
        "SD 2.1":       ("SD 2.1", {}),
        "SD 2.1-base":  ("SD 2.1", {"prediction": "epsilon"}),
        "SDXL":         ("SDXL base", {}),
        "SDXL refiner": ("SDXL refiner", {}),
        "SD 1.5 inpainting": ("SD 1.5", {"in_channels": 9}),
        "SD 2 inpainting":   ("SD 2.1", {"in_channels": 9, "prediction": "epsilon"}),
        "SDXL inpainting":   ("SDXL base", {"in_channels": 9})}.items()}


@pytest.fixture(scope="module")
def picture():
    """72 × 64 pixels, smooth and not symmetric."""
    y, x = np.mgrid[0:64, 0:72] / 64
    return PIL.Image.fromarray((255 * np.stack([x / 1.2, y, (x + y) / 2.2], axis=2)).astype(np.uint8))


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SD 2.1-base", "SDXL"])
def test_text_to_image(models, name):
    """With the scheduler that the model's own files name."""
    pipe   = ldm.load(models[name], device="cpu")
    ours   = ldm.sample("a red cat", pipe, steps=4, seed=SEEDS, num_images=2, height=64, width=72,
                        output_type="np")
    theirs = tiny.their_pictures(models[name], pipe.defaults.scheduler, SEEDS, prompt="a red cat",
                                 num_inference_steps=4, height=64, width=72)
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SD 2.1-base", "SDXL", "SDXL refiner"])
def test_image_to_image(models, name, picture):
    pipe   = ldm.load(models[name], device="cpu")
    ours   = ldm.img2img("a red cat", picture, pipe, strength=0.5, steps=6, scheduler="euler", seed=SEEDS,
                         num_images=2, output_type="np")
    theirs = tiny.their_pictures(models[name], "euler", SEEDS, "img2img", prompt="a red cat", image=picture,
                                 strength=0.5, num_inference_steps=6,
                                 guidance_scale=pipe.defaults.guidance_scale)
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL", "SDXL refiner",
                                  "SD 1.5 inpainting", "SD 2 inpainting", "SDXL inpainting"])
def test_inpainting(models, name, strength, picture):
    mask   = PIL.Image.fromarray(np.pad(np.full((32, 24), 255, np.uint8), ((16, 16), (32, 16))))
    pipe   = ldm.load(models[name], device="cpu")
    ours   = ldm.inpaint("a red cat", picture, mask, pipe, strength=strength, steps=6, scheduler="euler",
                         seed=5, composite=False, output_type="np")
    theirs = tiny.their_pictures(models[name], "euler", [5], "inpaint", prompt="a red cat", image=picture,
                                 mask_image=mask, height=64, width=72, strength=strength,
                                 num_inference_steps=6, guidance_scale=pipe.defaults.guidance_scale)
    assert np.abs(ours - theirs).max() < 1e-4


def test_the_page_of_the_families(models, monkeypatch, tmp_path):
    """Its code runs, with a tiny model in place of each published one, few steps and small pictures."""
    published = {"stable-diffusion-v1-5/stable-diffusion-v1-5": "SD 1.5",
                 "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
                 "stabilityai/stable-diffusion-xl-refiner-1.0": "SDXL refiner"}
    load = ldm.load

    def load_tiny(name):
        pipe = load(models[published[name]], device="cpu")
        return replace(pipe, defaults=replace(pipe.defaults, steps=5))
    monkeypatch.setattr(ldm, "load", load_tiny)
    monkeypatch.setattr(ldm, "load_vae", lambda name: ldm.models.TinyVAE().eval())
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```py\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    for large, small in (("1152", "72"), ("896", "64"), ("steps=40", "steps=5")):
        assert large in code
        code = code.replace(large, small)
    names = {"ldm": ldm}
    exec(code, names)
    assert names["image"].size == (64, 64)
    assert [PIL.Image.open(path).size for path in sorted(tmp_path.glob("step*.png"))] == [(64, 64)] * 5
