"""Stable Diffusion XL: the base, its refiner, and the hand-over from one to the other inside one run."""
import dataclasses
import json
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import oracles
import PIL.Image
import pytest
import tiny
import torch
from oracles import Gaussian, relative
from transformers import CLIPTextModelWithProjection

import ldm
from ldm import Sizes
from ldm.guidance import switch
from ldm.models import UNet
from ldm.schedulers import SCHEDULERS

QUICK   = {"height": 64, "width": 72, "output_type": "np"}
PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"base": tiny.write(root / "base", "SDXL base"),
            "encoded": tiny.write(root / "encoded", "SDXL base", zero_empty=False),
            "refiner": tiny.write(root / "refiner", "SDXL refiner")}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: ldm.load(folder, device="cpu") for name, folder in folders.items()}


# ── Text and sizes ──────────────────────────────────────────────────────────────────────────────────────────

def test_context_and_pooled_text_are_those_of_diffusers(folders, pipes):
    prompts = ["a red cat", "!"]
    with torch.inference_mode():
        context, _, pooled, _ = tiny.theirs(folders["base"]).encode_prompt(prompts)
        found = pipes["base"].text(prompts)
    assert found.context.shape == (2, 77, 8 + 16)
    torch.testing.assert_close((found.context, found.vector), (context, pooled))


def test_the_second_tokenizer_pads_with_exclamation_marks(pipes):
    text = pipes["base"].text
    assert [one.tokenizer.pad_token for one in (text.first, text.second)] == ["<|endoftext|>", "!"]
    assert text.second.tokenizer.pad_token_id == 0


def test_pooled_is_the_end_token_though_others_have_higher_ids(folders):
    """Tokens that were added to the vocabulary come after the end token; the configs say its id is 2."""
    folder = folders["base"]
    text   = ldm.load(folder, device="cpu").text.second
    text.tokenizer.add_tokens("<mine>")
    text.model.resize_token_embeddings(len(tiny.WORDS) + 1)
    theirs = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    theirs.resize_token_embeddings(len(tiny.WORDS) + 1)
    theirs.load_state_dict(text.model.state_dict())
    prompt = ["a <mine> cat"]
    tokens = text.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert tokens.max() == len(tiny.WORDS)
    found  = text(prompt).vector
    assert (found - theirs(tokens).text_embeds).abs().max() > 0.01          # the trap: the config says 2
    theirs.text_model.eos_token_id = text.tokenizer.eos_token_id
    torch.testing.assert_close(found, theirs(tokens).text_embeds)


def test_a_long_prompt_is_warned_of_once_though_two_encoders_read_it(pipes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipes["base"].text(["a " * 75 + "cat"])
    assert len(caught) == 1


def test_the_numbers():
    sizes = Sizes(original=(1024, 768), crop=(16, 32), target=(512, 640), aesthetic_score=7.0)
    assert sizes.numbers(64, 72, 6) == (1024, 768, 16, 32, 512, 640)
    assert sizes.numbers(64, 72, 6, negative=True) == (1024, 768, 16, 32, 512, 640)
    assert sizes.numbers(64, 72, 5) == (1024, 768, 16, 32, 7.0)
    assert sizes.numbers(64, 72, 5, negative=True) == (1024, 768, 16, 32, 2.5)
    assert Sizes().numbers(64, 72, 6) == (64, 72, 0, 0, 64, 72)
    with pytest.raises(ValueError, match="wants 4 numbers"):
        sizes.numbers(64, 72, 4)


@pytest.mark.filterwarnings("ignore:The autoencoder scales")          # a U-Net without a vector
def test_a_vector_that_is_complete_stays_as_it_is(pipes):
    """Of precomputed embeddings, say."""
    pipe  = pipes["base"]
    whole = pipe.condition(["a cat"], 64, 64)
    again = replace(pipe, text=lambda prompts: whole).condition(["a cat"], 64, 64)
    assert again is whole
    plain = UNet(replace(pipe.unet.config, vector_dim=None)).eval()                # which reads no vector
    assert replace(pipe, unet=plain, text=lambda prompts: whole).condition(["a cat"], 64, 64) is whole
    other = UNet(replace(pipe.unet.config, vector_time_dim=None)).eval()           # a vector of one's own
    alone = replace(pipe, unet=other, text=lambda prompts: replace(whole, vector=torch.ones(len(prompts), 7)))
    with pytest.raises(ValueError, match=r"tensor \(N, 68\), not \(1, 7\)"):
        ldm.sample("a cat", alone, steps=1, guidance_scale=1, spacing="trailing", **QUICK)


# ── The base beside diffusers ───────────────────────────────────────────────────────────────────────────────

def difference(folders, pipes, which, theirs, **ours):
    """The largest difference of a picture of ours and of diffusers', on [0, 1]."""
    same     = {"prompt": "a red cat", **QUICK}
    expected = tiny.their_pictures(folders[which], "euler", [5], num_inference_steps=4, **same, **theirs)
    found    = ldm.sample(model=pipes[which], scheduler="euler", seed=5, steps=4, **same, **ours)
    return np.abs(found - expected).max()


@pytest.mark.parametrize("name", ["euler", "ddim", "pndm", "heun", "lms", "euler_a", "dpmpp_2m"])
def test_same_picture_as_diffusers(folders, name):
    assert tiny.picture_difference(folders["base"], name, steps=4) < 1e-4


@pytest.mark.parametrize(("which", "ours", "theirs"), [
    ("base",    "",    None), ("base",    " ", ""), ("base",    "bad", "bad"),
    ("encoded", "",    None), ("encoded", " ", ""), ("encoded", "bad", "bad"),
])
def test_negative_prompts_and_what_an_empty_one_is(folders, pipes, which, ours, theirs):
    """Zeros or the states of the empty text, as the model's file says; diffusers' None is our default, ""."""
    assert difference(folders, pipes, which, {"negative_prompt": theirs}, negative_prompt=ours) < 1e-4


def test_zeros_are_not_the_empty_text(pipes):
    """Within a batch too, only the empty negative prompts are zeros."""
    cond = pipes["base"].condition(["", " ", "bad"], 64, 72, negative=True)
    assert (cond.context[0] == 0).all()
    assert (cond.vector[0, :20] == 0).all()
    assert cond.vector[0, 20:].abs().max() > 0.5                            # the sizes stay
    for row in (1, 2):
        assert cond.context[row].abs().max() > 0.5
        assert cond.vector[row, :20].abs().max() > 0.1
    assert pipes["base"].condition([""], 64, 72).context.abs().max() > 0.5


@pytest.mark.parametrize("negative", [False, True])
def test_sizes_crops_and_negative_ones(folders, pipes, negative):
    theirs = {"original_size": (1024, 768), "crops_coords_top_left": (16, 32), "target_size": (512, 640)}
    ours   = {"sizes": Sizes((1024, 768), (16, 32), (512, 640))}
    if negative:
        theirs |= {"negative_original_size": (256, 320), "negative_crops_coords_top_left": (8, 0),
                   "negative_target_size": (1024, 512)}
        ours   |= {"negative_sizes": Sizes((256, 320), (8, 0), (1024, 512))}
    assert difference(folders, pipes, "base", theirs, **ours) < 1e-4
    assert difference(folders, pipes, "base", {}, **ours) > 1e-3                     # they have an effect


def test_negative_sizes_hold_for_each_picture_of_a_batch(pipes):
    """In diffusers they are mixed up with the others as soon as there are two pictures."""
    same = {"model": pipes["base"], "scheduler": "euler", "steps": 4, **QUICK,
            "sizes": Sizes((1024, 768)), "negative_sizes": Sizes((256, 320))}
    batch = ldm.sample("a red cat", seed=5, num_images=2, **same)
    for i in range(2):
        np.testing.assert_allclose(ldm.sample("a red cat", seed=5 + i, **same), batch[i:i + 1], atol=1e-5)


def test_defaults_of_the_family(pipes):
    assert pipes["base"].defaults == ldm.pipeline.Defaults("euler", 50, 5.0, 64, 64)


# ── The refiner ─────────────────────────────────────────────────────────────────────────────────────────────

def test_the_refiners_encoder_is_found_by_either_name(folders, pipes, tmp_path):
    copy = shutil.copytree(folders["refiner"], tmp_path / "copy")
    for part in ("text_encoder", "tokenizer"):
        (copy / f"{part}_2").rename(copy / part)
    index = json.loads((copy / "model_index.json").read_text())
    for part in ("text_encoder", "tokenizer"):
        index[part] = index.pop(f"{part}_2")
    (copy / "model_index.json").write_text(json.dumps(index))
    found, expected = (pipe.condition(["a cat"], 64, 72) for pipe in (ldm.load(copy), pipes["refiner"]))
    assert torch.equal(found.context, expected.context)
    assert torch.equal(found.vector, expected.vector)


def their_ensemble(folders, handover, steps, task="sample", **arguments):
    """diffusers' two pipelines: the base stops at a fraction, the refiner goes on from its latents."""
    same = {"prompt": "a red cat", "num_inference_steps": steps}
    half = tiny.their_pictures(folders["base"], "euler", [5], task, denoising_end=handover,
                               output_type="latent", **same, **arguments)
    return tiny.their_pictures(folders["refiner"], "euler", [5], "img2img", denoising_start=handover,
                               image=half, **same)


@pytest.mark.parametrize(("handover", "steps_of_the_base"), [
    (0.8, 4), (0.799, 4), (0.798, 3), (0.4, 2),      # of the times 801, 601, 401, 201, 1
])
def test_base_and_refiner_as_diffusers_in_two_pipelines(folders, pipes, handover, steps_of_the_base):
    """Euler's method has no history that diffusers could lose. The boundary itself is the base's."""
    calls  = []
    def count(which):
        def unet(*args):
            calls.append(which)
            return pipes[which].unet(*args)
        unet.config = pipes[which].unet.config
        return dataclasses.replace(pipes[which], unet=unet)

    ours   = ldm.sample("a red cat", count("base"), refiner=count("refiner"), handover=handover,
                        scheduler="euler", steps=5, seed=5, **QUICK)
    theirs = their_ensemble(folders, handover, 5, height=64, width=72)
    assert calls == ["base"] * steps_of_the_base + ["refiner"] * (5 - steps_of_the_base)
    assert np.abs(ours - theirs).max() < 1e-4


def test_image_to_image_with_a_refiner(folders, pipes):
    ours   = ldm.img2img("a red cat", PICTURE, pipes["base"], refiner=pipes["refiner"], strength=0.6,
                         scheduler="euler", steps=10, seed=5, output_type="np")
    theirs = their_ensemble(folders, 0.8, 10, "img2img", image=PICTURE, strength=0.6)
    assert np.abs(ours - theirs).max() < 1e-4


def test_the_refiner_reads_aesthetic_scores(folders, pipes):
    """For the prompt and the negative prompt, in place of the target size."""
    def ours(**scores):
        return ldm.img2img("a red cat", PICTURE, pipes["refiner"], strength=0.5, scheduler="euler", steps=4,
                           seed=5, output_type="np", sizes=Sizes((1024, 768), (16, 32), **scores))
    theirs = tiny.their_pictures(
        folders["refiner"], "euler", [5], "img2img", prompt="a red cat", image=PICTURE, strength=0.5,
        num_inference_steps=4, aesthetic_score=9.0, negative_aesthetic_score=1.0, original_size=(1024, 768),
        crops_coords_top_left=(16, 32), negative_crops_coords_top_left=(16, 32))
    scored = ours(aesthetic_score=9.0, negative_aesthetic_score=1.0)
    assert np.abs(scored - theirs).max() < 1e-4
    assert np.abs(scored - ours()).max() > 1e-3


def test_a_refiner_that_cannot_go_on_says_why(folders, pipes, tmp_path):
    def refused(refiner, words):
        with pytest.raises(ValueError, match=words):
            ldm.sample("a red cat", pipes["base"], refiner=refiner, steps=2, **QUICK)
    refused(tiny.write(tmp_path / "sd15", "SD 1.5"), "only one of them is a Stable Diffusion XL")
    network = pipes["refiner"].unet
    nine    = dataclasses.replace(network.config, in_channels=9)
    refused(dataclasses.replace(pipes["refiner"], unet=type(network)(nine)), "9 input channels, made for inp")
    vae  = pipes["refiner"].vae
    away = dataclasses.replace(pipes["refiner"], unet=type(network)(network.config).to("meta"),
                               vae=type(vae)(vae.config).to("meta"))
    refused(away, "on different devices, cpu and meta")


@pytest.mark.parametrize("name", ["heun", "lms", "dpmpp_2m"])
def test_a_handover_to_the_same_network_changes_nothing(pipes, name):
    same  = {"scheduler": name, "steps": 6, **QUICK}
    whole = ldm.sample("a red cat", pipes["base"], **same)
    parts = ldm.sample("a red cat", pipes["base"], refiner=pipes["base"], **same)
    np.testing.assert_array_equal(whole, parts)


# ── The hand-over on Gaussian data, where both networks can be perfect ──────────────────────────────────────

STEPS, BORDER = 25, 200                     # the refiner's are the times below
CONFIG        = oracles.config_of("leading")
GAUSSIAN      = Gaussian()
SCHEDULE      = oracles.SD_SCHEDULE
NETWORK       = GAUSSIAN.network(SCHEDULE)


def error(row, sigmas, x):
    """Of the end of a run, in the units of diffusers' class, from the usual state at the first σ."""
    exact = GAUSSIAN.exact(GAUSSIAN.state(sigmas[0]), sigmas[0], sigmas[-1])
    return relative(x, exact / (1 + sigmas[-1]**2) ** 0.5 if row.start_vp else exact)


def their_end(row, x):
    """Two pipelines of diffusers: its scheduler until the border, a second of its schedulers from there."""
    for half in ("base", "refiner"):
        scheduler = oracles.their_scheduler(row, CONFIG)
        scheduler.set_timesteps(STEPS)
        times = scheduler.timesteps
        if half == "base":
            times = times[times >= BORDER]
        else:
            count = int((times < BORDER).sum())
            count += scheduler.order == 2 and count % 2 == 0          # as its image-to-image pipeline has it
            times = times[-count:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0 if half == "base" else len(scheduler.timesteps) - count)
        for t in times:
            x = scheduler.step(NETWORK(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not re.search("ddpm|euler_a|sde|lcm", name)])
def test_the_error_after_a_handover_is_that_of_the_undivided_run(name):
    """In one run of one scheduler the history goes on; diffusers' second run begins without one."""
    row    = SCHEDULERS[name]
    sigmas = row.sigmas(SCHEDULE, STEPS, config=CONFIG)
    start  = GAUSSIAN.state(sigmas[0])
    seen   = {"base": [], "refiner": []}

    def expert(which):
        denoiser = ldm.Denoiser(NETWORK, SCHEDULE, whole_t=row.whole)
        nothing  = ldm.Conditioning(torch.zeros(1, 1, 1, dtype=torch.float64))
        def denoise(x, sigma):
            seen[which].append(sigma)
            return denoiser(x, sigma, nothing)
        return denoise

    def end(denoise):
        noise = {"noise": None} if row.stochastic else {}                              # none is drawn, though
        *_, x = row.function(denoise, start, sigmas, **noise, **row.options(SCHEDULE))
        return x / (1 + sigmas[-1]**2) ** 0.5 if row.start_vp else x

    whole   = error(row, sigmas, end(expert("base")))
    seen["base"].clear()
    divided = error(row, sigmas, end(switch(expert("base"), expert("refiner"), SCHEDULE.sigma(BORDER))))
    theirs  = error(row, sigmas, their_end(row, start / (1 + sigmas[0]**2) ** 0.5 if row.start_vp else start))
    assert divided == whole < 0.1
    assert min(seen["base"]) >= SCHEDULE.sigma(BORDER) > max(seen["refiner"])
    if name == "euler":
        assert theirs == pytest.approx(whole, rel=1e-3)
    if name in ("heun", "lms", "pndm"):
        assert theirs > 3 * whole
