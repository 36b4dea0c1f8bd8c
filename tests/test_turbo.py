"""Few steps: latent consistency models, Turbo models, the tiny autoencoder. Beside diffusers' pipelines."""
import json
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import oracles
import PIL.Image
import pytest
import tiny
import torch

import ldm
from ldm.models import TinyVAE, TinyVAEConfig
from ldm.pipeline import Defaults

PROMPT  = "a red cat"
SEEDS   = [5, 9]
SIZE    = {"height": 64, "width": 72}
PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8))

LCM     = {"_class_name": "LCMScheduler", "original_inference_steps": 50}
EULER   = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
EULER_A = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
MODELS  = {"lcm":        ("SD 1.5",    LCM,     {"time_cond_proj_dim": 12}),
           "lcm-sdxl":   ("SDXL base", LCM,     {"time_cond_proj_dim": 12}),
           "sd-turbo":   ("SD 2.1",    EULER,   {}),
           "sdxl-turbo": ("SDXL base", EULER_A, {})}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, (family, scheduler, unet) in MODELS.items():
        tiny.write(root / name, family, **unet)
        (root / name / "scheduler/scheduler_config.json").write_text(json.dumps({**oracles.SD, **scheduler}))
    return {name: root / name for name in MODELS}


def ours(folder, task=ldm.sample, image=(), **options):
    return task(PROMPT, *image, ldm.load(folder, device="cpu"), seed=SEEDS, num_images=2, output_type="np",
                **options)


def theirs(folder, name, task="sample", **arguments):
    return tiny.their_pictures(folder, name, SEEDS, task, prompt=PROMPT, **arguments)


def lcm_theirs(folder, kind, **arguments):
    """By diffusers' own pipelines for these models; `theirs` has a place for their embedding too."""
    pipeline = getattr(diffusers, f"LatentConsistencyModel{kind}Pipeline")(
        **{**tiny.theirs(folder).components, "scheduler": diffusers.LCMScheduler.from_config(oracles.SD)},
        requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
                    num_images_per_prompt=2, output_type="np", **arguments).images


def test_a_consistency_model_that_is_not_told_the_scale_is_not_guided(tmp_path):
    folder = tiny.write(tmp_path)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**oracles.SD, **LCM}))
    assert ldm.load(folder, device="cpu").defaults == Defaults("lcm", 4, 1.0, 64, 64)


def close(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    return np.abs(a - b).max() < tolerance


# ── Latent consistency models ───────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_equals_diffusers(folders, steps):
    found  = ours(folders["lcm"], steps=steps, **SIZE)
    wanted = lcm_theirs(folders["lcm"], "", num_inference_steps=steps, guidance_scale=8.5, **SIZE)
    assert close(found, wanted)


@pytest.mark.parametrize(("steps", "strength"), [(8, 0.5), (5, 0.8), (2, 0.5)])
def test_lcm_from_a_picture_equals_diffusers(folders, steps, strength):
    """There, `num_inference_steps` are those that are done: the times are chosen below the strength."""
    found  = ours(folders["lcm"], ldm.img2img, [PICTURE], steps=steps, strength=strength, guidance_scale=3)
    wanted = lcm_theirs(folders["lcm"], "Img2Img", image=PICTURE, num_inference_steps=round(steps * strength),
                        strength=strength, guidance_scale=3)
    assert close(found, wanted)


def test_sdxl_lcm_equals_diffusers(folders):
    found  = ours(folders["lcm-sdxl"], steps=3, guidance_scale=8, **SIZE)
    assert close(found, theirs(folders["lcm-sdxl"], "lcm", num_inference_steps=3, guidance_scale=8.0, **SIZE))


def test_lcm_defaults_come_from_its_files(folders):
    assert ldm.load(folders["lcm"]).defaults == Defaults("lcm", 4, 8.5, 64, 64)
    assert close(ours(folders["lcm"]), lcm_theirs(folders["lcm"], "", height=64, width=64))   # theirs: 4, 8.5


def test_lcm_is_told_the_scale_and_called_once_a_step(folders):
    pipe, told = ldm.load(folders["lcm"], device="cpu"), []
    def unet(x, t, context, vector, guidance):
        told.append((len(x), guidance.tolist()))
        return pipe.unet(x, t, context, vector, guidance)
    unet.config = pipe.unet.config
    plain, strong = (ldm.sample(PROMPT, replace(pipe, unet=unet), guidance_scale=scale, num_images=2, steps=3,
                                output_type="np") for scale in (1, 8))
    assert told == [(2, [1, 1])] * 3 + [(2, [8, 8])] * 3
    assert np.abs(plain - strong).max() > 1e-3


@pytest.mark.parametrize(("option", "value"), [
    ("negative_prompt", "bad"), ("guidance_rescale", 0.7), ("guidance_interval", (0.1, 5))])
def test_lcm_says_what_has_no_effect(folders, option, value):
    pipe = ldm.load(folders["lcm"], device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = ldm.sample(PROMPT, pipe, steps=1, output_type="pt")
    with pytest.warns(UserWarning, match=f"lcm was taught guidance away from the empty prompt.*{option}"):
        found = ldm.sample(PROMPT, pipe, steps=1, output_type="pt", **{option: value})
    assert torch.equal(found, plain)


def test_lcm_takes_no_more_steps_than_it_was_taught(folders):
    with pytest.raises(ValueError, match=r"steps is 51, but the model was taught 50 of 1000 times"):
        ours(folders["lcm"], steps=51)


# ── Turbo ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize(("model", "name"), [("sd-turbo", "euler"), ("sdxl-turbo", "euler_a")])
def test_turbo_equals_diffusers(folders, model, name, steps):
    """The cards say guidance_scale=0.0 for none, which is 1 here, and what the name stands for."""
    found = ours(folders[model], steps=steps, **SIZE)
    assert close(found, theirs(folders[model], name, num_inference_steps=steps, guidance_scale=0.0, **SIZE))


@pytest.mark.parametrize(("steps", "prediction"), [(2, "epsilon"), (4, "epsilon"), (1, "sample")])
def test_lightning_equals_diffusers(tmp_path, steps, prediction):
    """Set up as its card says: Euler with trailing spacing, no guidance, and x₀ for one step."""
    folder = tiny.write(tmp_path / "model", "SDXL base", prediction=prediction)
    (folder / "scheduler/scheduler_config.json").write_text(
        json.dumps({**oracles.SD, **EULER, "prediction_type": prediction}))
    found  = ours(folder, scheduler="euler", spacing="trailing", steps=steps, guidance_scale=1, **SIZE)
    assert close(found, theirs(folder, "euler", num_inference_steps=steps, guidance_scale=0.0, **SIZE))


@pytest.mark.parametrize(("model", "name"), [("sd-turbo", "euler"), ("sdxl-turbo", "euler_a")])
def test_turbo_from_a_picture_equals_diffusers(folders, model, name):
    """The example on their cards: one step of two."""
    options = {"strength": 0.5}
    found   = ours(folders[model], ldm.img2img, [PICTURE], steps=2, **options)
    assert close(found, theirs(folders[model], name, "img2img", image=PICTURE, num_inference_steps=2,
                               guidance_scale=0.0, **options))


def test_turbo_defaults_come_from_its_name(folders, tmp_path):
    assert ldm.load(folders["sd-turbo"]).defaults   == Defaults("euler", 1, 1.0, 64, 64)
    assert ldm.load(folders["sdxl-turbo"]).defaults == Defaults("euler_a", 1, 1.0, 64, 64)
    renamed = tmp_path / "SDXL-Turbo"
    renamed.symlink_to(folders["sdxl-turbo"])
    assert ldm.load(renamed).defaults == Defaults("euler_a", 1, 1.0, 64, 64)
    renamed = tmp_path / "another"
    renamed.symlink_to(folders["sdxl-turbo"])
    assert ldm.load(renamed).defaults == Defaults("euler_a", 50, 5.0, 64, 64)


def test_turbo_at_the_times_of_its_authors(folders):
    times  = [999, 899, 799, 699]
    found  = ours(folders["sd-turbo"], timesteps=times, **SIZE)
    wanted = theirs(folders["sd-turbo"], "euler", timesteps=times, guidance_scale=0.0, **SIZE)
    assert close(found, wanted)
    assert not close(found, ours(folders["sd-turbo"], steps=4, **SIZE), 1e-2)


# ── The tiny autoencoder in a pipeline ──────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def taesd():
    """(diffusers', ours) with the same weights."""
    torch.manual_seed(0)
    their_vae = diffusers.AutoencoderTiny.from_config(oracles.TINY_TAESD)
    our_vae   = TinyVAE(TinyVAEConfig.from_hf(oracles.TINY_TAESD)).eval()
    oracles.same_weights(their_vae, our_vae)
    return their_vae, our_vae


@pytest.mark.parametrize("task", ["sample", "img2img"])
def test_pictures_with_the_tiny_autoencoder_equal_diffusers(folders, taesd, task):
    """From a picture, diffusers draws nothing for its latents, which are certain. Here the first draw is
    theirs in any case, so that the noise, and the picture, stay when the autoencoder is exchanged."""
    folder     = folders["sd-turbo"]
    options    = {"steps": 2, "seed": SEEDS, "num_images": 2, "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe       = replace(ldm.load(folder, device="cpu"), vae=taesd[1])
    if task == "sample":
        more  = SIZE
        found = ldm.sample(PROMPT, pipe, **options, **more)
    else:
        more  = {"image": PICTURE, "strength": 0.5}
        found = ldm.img2img(PROMPT, model=pipe, **options, **more)
        for generator in generators:
            torch.randn(1, 4, 8, 9, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.theirs(folder, task), "vae", taesd[0])
        wanted = theirs(folder, "euler", task, generator=generators, num_inference_steps=2,
                        guidance_scale=0.0, **more)
    assert close(found, wanted)
    assert found.std() > 1e-3


def test_a_preview_of_each_step(folders, taesd):
    pipe, previews = ldm.load(folders["lcm"], device="cpu"), []
    def look(step, x, x0):
        previews.append(replace(pipe, vae=taesd[1]).decode(x0))
    ldm.sample(PROMPT, pipe, steps=3, callback=look, **SIZE)
    assert [tuple(picture.shape) for picture in previews] == [(1, 3, 64, 72)] * 3
    assert not torch.equal(previews[0], previews[1])
