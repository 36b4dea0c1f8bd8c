"""ldm.img2img: against diffusers, against the exact solution, and at both ends of its strength."""
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from oracles import Gaussian

import ldm
from ldm.noise import seeded
from ldm.schedulers import SCHEDULERS

QUICK = {"steps": 4, "spacing": "trailing", "scheduler": "euler"}


def painting(width: int = 72, height: int = 64, seed: int = 0) -> PIL.Image.Image:
    """A smooth picture of many colours."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


def pixels(pipe, image=None, prompt="a red cat", **arguments) -> np.ndarray:
    return ldm.img2img(prompt, painting() if image is None else image, pipe,
                       **{**QUICK, "output_type": "np", **arguments})


def levels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image)[None] / 255


# ── Beside diffusers ────────────────────────────────────────────────────────────────────────────────────────

ASTRAY = {"lms", "pndm", "pndm_prk"}        # what diffusers does in the middle, see ../docs/differences.md


@pytest.mark.parametrize(("name", "steps", "strength"), [
    *((name, 5, strength) for name in SCHEDULERS if name not in ASTRAY for strength in (0.4, 0.8)),
    ("dpmpp_3m", 16, 0.5)])         # its order falls at the end if the whole run has less than 15 steps
def test_same_picture_as_diffusers(folder, pipe, name, steps, strength):
    """Where steps · strength is whole; diffusers rounds down. Two pictures of one, in a batch."""
    prompts = {"negative_prompt": "bad", "strength": strength}
    theirs  = tiny.their_pictures(folder, name, [5, 9], "img2img", prompt="a red cat", image=painting(),
                                  num_inference_steps=steps, **prompts)
    ours    = pixels(pipe, scheduler=name, spacing=None, steps=steps, seed=[5, 9], num_images=2, **prompts)
    assert np.abs(ours - theirs).max() < 1e-4


def test_same_pictures_as_diffusers_for_a_list_of_images(folder, pipe):
    """One for each prompt, on which the pictures of that prompt are made."""
    given   = {"prompt": ["a cat", "the dog"], "image": [painting(seed=1), painting(seed=2)], "strength": 0.5}
    theirs  = tiny.their_pictures(folder, "dpmpp_2m", [3, 4], "img2img", num_images_per_prompt=1,
                                  num_inference_steps=4, **given)
    once    = pixels(pipe, scheduler="dpmpp_2m", spacing=None, seed=[3, 4], **given)
    twice   = pixels(pipe, scheduler="dpmpp_2m", spacing=None, seed=[3, 0, 4, 0], num_images=2, **given)
    assert np.abs(once - theirs).max() < 1e-4
    assert np.abs(twice[::2] - theirs).max() < 1e-4


def test_same_picture_as_diffusers_with_v_prediction(tmp_path):
    folder = tiny.write(tmp_path / "v", prediction="v_prediction")
    theirs = tiny.their_pictures(folder, "ddim", [3], "img2img", prompt="a cat", image=painting(),
                                 strength=0.6, num_inference_steps=5)
    ours   = pixels(ldm.load(folder, device="cpu"), prompt="a cat", scheduler="ddim", spacing=None, steps=5,
                    seed=3, strength=0.6)
    assert np.abs(ours - theirs).max() < 1e-4


# ── Beside the exact solution ───────────────────────────────────────────────────────────────────────────────

GAUSSIAN = Gaussian(*(values.view(1, 4, 1, 1).float() for values in (Gaussian().mean, Gaussian().std)))


def error(pipe, name: str, steps: int, strength: float) -> float:
    """How far the end of a run is from the exact solution, in units of how far its start was from the mean.

    The start of image to image is put together here: the first draw is the latent's, the second the noise.
    """
    perfect = replace(pipe, unet=GAUSSIAN.network(pipe.schedule), scheduler_config={})
    run     = {"scheduler": name, "steps": steps, "guidance_scale": 1, "output_type": "latent", "seed": 3}
    row     = SCHEDULERS[name]
    sigmas  = row.sigmas(pipe.schedule, steps)
    generator     = torch.Generator().manual_seed(3)
    first, second = (torch.randn(1, 4, 8, 9, generator=generator) for _ in range(2))
    if strength == 1:
        top, x = sigmas[0], first * row.start_scale(sigmas[0])
        found  = ldm.sample("a cat", perfect, height=64, width=72, **run)
    else:
        mean, std = pipe.encode(torch.from_numpy(levels(painting())).permute(0, 3, 1, 2) * 2 - 1)
        top    = sigmas[round(steps * (1 - strength))]
        x      = mean + std * first + top * second
        found  = ldm.img2img("a cat", painting(), perfect, strength=strength, **run)
    exact = GAUSSIAN.exact(x, top, sigmas[-1])
    scale = ((x - GAUSSIAN.mean) / (GAUSSIAN.std**2 + top**2).sqrt()).abs().amax((2, 3), keepdim=True)
    return ((found * (1 + sigmas[-1]**2) ** 0.5 - exact) / scale).abs().max().item()


@pytest.mark.parametrize("name", [name for name in SCHEDULERS
                                  if name not in ("ddpm", "euler_a", "dpmpp_2m_sde", "lcm")])
def test_a_start_in_the_middle_is_as_good_as_one_at_the_top(pipe, name):
    """The error at the end. For K-LMS, that of a first step by Euler's method would be three times all others
    at 50 steps; for DPM-Solver, a grouping of the steps that starts with the run up to four times (at 30)."""
    for steps in (20, 30, 50):
        full = error(pipe, name, steps, 1)
        assert 1e-5 < full < 0.25
        for strength in (0.5, 0.25 if steps == 20 else 0.3):
            assert error(pipe, name, steps, strength) < 1.3 * full


# ── Strength ────────────────────────────────────────────────────────────────────────────────────────────────

def walked(pipe, **arguments) -> list[float]:
    """The σ's that img2img hands to a scheduler; this one does nothing."""
    seen: list[float] = []

    def still(denoise, x, sigmas):
        seen.extend(sigmas)
        yield x
    pixels(pipe, **{"scheduler": still, "output_type": "latent", **arguments})
    return seen


@pytest.mark.parametrize(("steps", "strength", "taken"), [
    (100, 0.29, 29),                                    # 100 * 0.29 is 28.999999999999996
    (50,  0.29, 15), (10, 0.25, 3), (10, 0.35, 4),      # halves up, and 50 * 0.29 is 14.499999999999998
    (10,  0.24, 2),  (10, 0.26, 3), (10, 0.05, 1), (50, 0.999, 50),
])
def test_strength_times_steps_is_rounded(pipe, steps, strength, taken):
    sigmas = pipe.schedule.sigmas(steps, "trailing")
    assert walked(pipe, steps=steps, strength=strength) == sigmas[steps - taken:]


def test_strength_is_a_part_of_sigmas_and_timesteps_of_ones_own(pipe):
    own = {"steps": None, "spacing": None, "strength": 0.5}
    assert walked(pipe, sigmas=[9, 5, 3, 1, 0.1], **own) == [3, 1, 0.1]
    assert walked(pipe, timesteps=[900, 600, 300, 100], **own) == [*map(pipe.schedule.sigma, (300, 100)), 0]


def test_the_start_is_the_picture_with_noise_of_the_first_sigma(pipe):
    """Between two noises of one seed, only the amount differs."""
    def start(**arguments):
        seen = []

        def still(denoise, x, sigmas):
            seen.append(x)
            yield x
        pixels(pipe, scheduler=still, steps=None, spacing=None, seed=7, output_type="latent", **arguments)
        return seen[0]
    generator     = torch.Generator().manual_seed(7)
    first, second = (torch.randn(1, 4, 8, 9, generator=generator) for _ in range(2))
    mean, std     = pipe.encode(torch.from_numpy(levels(painting())).permute(0, 3, 1, 2) * 2 - 1)
    torch.testing.assert_close(start(sigmas=[9, 3, 1, 0], strength=0.7), mean + std * first + 3 * second)
    torch.testing.assert_close(start(sigmas=[9, 3, 1, 0], strength=0.4), mean + std * first + 1 * second)


def test_strength_of_one_is_text_to_image(pipe):
    for name in ("euler_a", "pndm"):
        run = {**QUICK, "scheduler": name, "seed": [4, 2], "num_images": 2, "output_type": "latent"}
        np.testing.assert_array_equal(pixels(pipe, strength=1, **run),
                                      ldm.sample("a red cat", pipe, height=64, width=72, **run))


def test_strength_of_zero_is_a_round_trip_through_the_autoencoder(pipe):
    """Also where the last step ends above σ = 0, as that of DDIM, and PNDM, who both would add noise."""
    never = replace(pipe, unet=None)
    for name in ("euler", "ddim", "pndm"):
        z         = pixels(never, scheduler=name, strength=0, output_type="latent", seed=3)
        mean, std = pipe.encode(torch.from_numpy(levels(painting())).permute(0, 3, 1, 2) * 2 - 1)
        noise     = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(z, mean + std * noise)
        shown = pixels(never, scheduler=name, strength=0, output_type="pt", seed=3)
        torch.testing.assert_close(shown, (pipe.decode(z) / 2 + 0.5).clamp(0, 1))


# ── Pictures in, pictures out ───────────────────────────────────────────────────────────────────────────────

def test_a_picture_of_any_size_loses_at_most_seven_pixels(pipe):
    """Of 75 × 70 the middle 72 × 64: 1 and 3 pixels on the left and at the top."""
    large = painting(75, 70)
    np.testing.assert_array_equal(pixels(pipe, large), pixels(pipe, large.crop((1, 3, 73, 67))))


def test_height_and_width_scale_and_crop(pipe):
    assert pixels(pipe, painting(300, 100), height=64, width=64).shape == (1, 64, 64, 3)
    assert pixels(pipe, painting(300, 100), height=32).shape == (1, 32, 96, 3)
    assert pixels(pipe, painting(300, 100), width=32, strength=1).shape == (1, 8, 32, 3)


def test_every_kind_of_picture_is_the_same_picture(pipe, tmp_path):
    image = painting()
    image.save(tmp_path / "in.png")
    array    = np.asarray(image)
    expected = pixels(pipe, image, strength=0.25)
    for kind in (tmp_path / "in.png", str(tmp_path / "in.png"), array, (array / 255)[None], [image],
                 torch.from_numpy(array / 255).permute(2, 0, 1)):
        np.testing.assert_allclose(pixels(pipe, kind, strength=0.25), expected, atol=1e-5)


def test_a_picture_of_a_batch_is_the_same_alone(pipe):
    pictures = [painting(seed=1), painting(seed=2)]
    batch = pixels(pipe, pictures, ["a cat", "the dog"], scheduler="euler_a", seed=6, num_images=2)
    for i, (prompt, k) in enumerate([("a cat", 0), ("a cat", 0), ("the dog", 1), ("the dog", 1)]):
        alone = pixels(pipe, pictures[k], prompt, scheduler="euler_a", seed=6 + i)
        np.testing.assert_allclose(alone, batch[i:i + 1], atol=1e-5)


def test_an_autoencoder_in_another_dtype(pipe):
    import copy
    half = replace(pipe, vae=copy.deepcopy(pipe.vae).to(torch.bfloat16))
    difference = np.abs(pixels(half, seed=2) - pixels(pipe, seed=2)).max()
    assert 0 < difference < 0.1


def test_the_parts_do_the_same_by_hand(pipe):
    picture   = torch.from_numpy(levels(painting())).permute(0, 3, 1, 2)
    sigmas    = pipe.schedule.sigmas(10, "trailing")[4:]
    noise     = seeded([5], (4, 8, 9))
    denoise   = ldm.guidance.classifier_free(ldm.Denoiser(pipe.unet, pipe.schedule), pipe.text(["a red cat"]),
                                             pipe.text([""]), 7.5)
    with torch.inference_mode():
        mean, std = pipe.encode(picture * 2 - 1)
        x         = mean + std * noise(0) + sigmas[0] * noise(1)
        *_, x     = ldm.schedulers.heun(denoise, x, sigmas)
    found = pixels(pipe, scheduler="heun", steps=10, strength=0.6, seed=5, output_type="latent")
    torch.testing.assert_close(found, x)


# ── The refiner ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("handover", "expected"), [(0.8, [199, 99]), (0.7, [299, 199, 99]), (1, [])])
def test_a_refiner_takes_over_in_image_to_image_too(pipe, handover, expected):
    """Below the time 1000·(1 − handover), wherever the run starts."""
    asked: list[float] = []

    def unet(x, t, *rest):
        asked.append(float(t))
        return pipe.unet(x, t, *rest)

    run = {"steps": 10, "strength": 0.5, "scheduler": "dpmpp_2m"}
    refined = pixels(pipe, refiner=replace(pipe, unet=unet), handover=handover, **run)
    assert asked == expected
    np.testing.assert_array_equal(refined, pixels(pipe, **run))


def test_what_costs_nothing_is_checked_before_a_model_is_loaded():
    for task, inputs in ((ldm.img2img, ()), (ldm.inpaint, (painting(),))):
        with pytest.raises(FileNotFoundError, match=r"no/such\.png"):
            task("a cat", "no/such.png", *inputs, "no/such/model")
        with pytest.raises(ValueError, match="strength is 2"):
            task("a cat", painting(), *inputs, "no/such/model", strength=2)


def test_a_warning_comes_once_and_for_the_caller(pipe):
    with pytest.warns(UserWarning, match="guidance_scale=0") as warned:
        ldm.img2img("a cat", painting(), pipe, strength=1, guidance_scale=0, steps=2, spacing="trailing")
    assert [warning.filename for warning in warned] == [__file__]
    for call in (lambda **options: ldm.sample("a cat", pipe, **options),
                 lambda **options: ldm.img2img("a cat", painting(), pipe, strength=1, **options)):
        with pytest.warns(UserWarning, match="there will be little to see") as warned:
            call(sigmas=[1.0, 0.0], output_type="latent")
        assert [warning.filename for warning in warned] == [__file__]


# ── What makes no sense ─────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("arguments", "error", "words"), [
    ({"strength": 1.1},                      ValueError, "strength is 1.1; it is a part of the run"),
    ({"strength": -0.1},                     ValueError, "strength is -0.1"),
    ({"strength": float("nan")},             ValueError, "strength is nan"),
    ({"strength": 0.02, "steps": 20},        ValueError, "less than half a step.*of at least 0.025"),
    ({"stepz": 3},                           TypeError,  "unexpected keyword argument 'stepz'"),
    ({"height": 100},                        ValueError, "multiple of 8: take 96 or 104"),
    ({"image": [painting()] * 2},            ValueError, "2 pictures or masks for 1 prompt"),
    ({"image": []},                          ValueError, "the list is empty"),
    ({"image": painting(100, 7)},            ValueError, "A picture of 100 × 7 pixels is too small"),
    ({"image": "no/such.png"},               FileNotFoundError, "no/such.png"),
    ({"image": [painting(), painting(80)], "prompt": ["a", "b"]}, ValueError, r"\[\(72, 64\), \(80, 64\)\]"),
    ({"handover": 0},                        ValueError, "handover is 0"),
    ({"handover": 1.2},                      ValueError, "handover is 1.2"),
])
def test_arguments_that_make_no_sense(pipe, arguments, error, words):
    with pytest.raises(error, match=words):
        pixels(pipe, **arguments)


def test_a_refiner_of_another_noise_schedule_is_refused(pipe):
    other = replace(pipe, schedule=ldm.NoiseSchedule.cosine(), name="another")
    with pytest.raises(ValueError, match="the refiner another were trained with different noise schedules"):
        pixels(pipe, refiner=other)


def test_an_inpainting_model_says_what_to_use(tmp_path):
    with pytest.raises(ValueError, match=r"9 input channels.*ldm\.inpaint; image to image needs one with 4"):
        pixels(ldm.load(tiny.write(tmp_path / "inpaint", in_channels=9), device="cpu"))
