"""Inpainting beside diffusers, and what it leaves exactly as it was."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import PIL.Image
import PIL.ImageFilter
import pytest
import tiny
import torch
from diffusers.image_processor import VaeImageProcessor
from oracles import Gaussian

import ldm
from ldm import inpainting
from ldm.noise import seeded
from ldm.schedulers import SCHEDULERS

QUICK = {"scheduler": "euler", "steps": 2, "spacing": "trailing", "output_type": "np"}
BOX   = (16, 24, 48, 56)                                            # top, left, bottom, right


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {f"{family}, {channels}": tiny.write(root / f"{family} {channels}", family, in_channels=channels)
            for family in ("SD 1.5", "SD 2.1", "SDXL base") for channels in (4, 9)}


@pytest.fixture(scope="module")
def pipes(folders) -> dict[str, ldm.Pipeline]:
    return {name: ldm.load(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def pipe(pipes) -> ldm.Pipeline:
    return pipes["SD 1.5, 4"]


def painting(height: int = 64, width: int = 72, seed: int = 0) -> PIL.Image.Image:
    """A smooth picture of many colours."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


def box_mask(height: int = 64, width: int = 72, box: tuple[int, int, int, int] = BOX) -> np.ndarray:
    """uint8 (height, width), 255 within the box."""
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left, bottom, right = box
    mask[top:bottom, left:right] = 255
    return mask


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def inpaint(pipe, image=None, mask=None, prompt="a red cat", **arguments):
    return ldm.inpaint(prompt, painting() if image is None else image, box_mask() if mask is None else mask,
                       pipe, **{**QUICK, **arguments})


# ── Beside diffusers ────────────────────────────────────────────────────────────────────────────────────────

# Started within the schedule, these of diffusers' do what belongs to the start of the whole one.
ASTRAY = {"pndm", "pndm_prk", "lms"}
CASES  = [*(("SD 1.5, 4", name, 1.0 if name in ASTRAY else 0.6) for name in SCHEDULERS),
          ("SD 1.5, 4", "euler_a", 1.0), ("SD 1.5, 9", "pndm", 1.0), ("SD 1.5, 9", "euler_a", 0.6),
          ("SD 2.1, 4", "ddim", 0.6), ("SD 2.1, 9", "ddim", 1.0),
          ("SDXL base, 4", "euler", 1.0), ("SDXL base, 9", "euler", 0.6)]


@pytest.mark.parametrize(("model", "name", "strength"), CASES)
def test_same_picture_as_diffusers(folders, pipes, model, name, strength):
    """The stochastic ones too: it draws the latents, the start, the masked latents, and then in each step."""
    mask   = torch.from_numpy(box_mask() / 255).float()
    theirs = tiny.their_pictures(               # a picture for each generator: else only the first draws one
        folders[model], name, [5, 9], "inpaint", prompt=["a red cat"] * 2, negative_prompt=["bad"] * 2,
        image=to_tensor(painting()).repeat(2, 1, 1, 1), mask_image=mask.repeat(2, 1, 1, 1), height=64,
        width=72, strength=strength, num_inference_steps=5, num_images_per_prompt=1, guidance_scale=7.5)
    ours = ldm.inpaint("a red cat", painting(), mask, pipes[model], scheduler=name, strength=strength,
                       steps=5, negative_prompt="bad", guidance_scale=7.5, seed=[5, 9], num_images=2,
                       composite=False, output_type="np")
    assert np.abs(ours - theirs).max() < 1e-4


def test_only_masked_as_diffusers(folders, pipe):
    """Where the box is of the model's size, so that neither scales. Theirs blends in bytes."""
    image, mask = painting(96, 112), box_mask(96, 112, (40, 40, 72, 72))
    theirs, = tiny.their_pictures(
        folders["SD 1.5, 4"], "ddim", [3], "inpaint", prompt="a red cat", image=image, strength=1.0,
        mask_image=PIL.Image.fromarray(mask), padding_mask_crop=16, height=64, width=64,
        num_inference_steps=5, output_type="pil")
    ours, = inpaint(pipe, image, mask, padding=16, scheduler="ddim", steps=5, spacing=None, seed=3,
                    output_type="pil")
    ours, theirs, image = (np.asarray(each).astype(int) for each in (ours, theirs, image))
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - image).max() > 20


def test_the_box_is_that_of_diffusers():
    random = np.random.default_rng(0)
    same, trials = 0, 300
    for _ in range(trials):
        size = random.integers(20, 200, 2)
        (top, bottom), (left, right) = (np.sort(random.choice(side + 1, 2, replace=False)) for side in size)
        mask = box_mask(*size, (top, left, bottom, right))
        height, width = (int(side) for side in random.integers(4, 40, 2) * 8)
        padding = int(random.integers(0, 40))
        x0, y0, x1, y1 = VaeImageProcessor.get_crop_region(PIL.Image.fromarray(mask), width, height, padding)
        ours  = inpainting.window(inpainting.read_mask(mask, *mask.shape), 8, height, width, padding)
        same += ours.box == (y0, x0, y1, x1)
    assert same > 0.99 * trials                                 # its floats may make a side one pixel shorter


def test_the_box_holds_all_that_is_blended_but_not_the_specks_of_a_jpeg():
    mask = PIL.Image.fromarray(box_mask(96, 96, (36, 36, 60, 60))).filter(PIL.ImageFilter.GaussianBlur(8))
    seen = inpainting.window(inpainting.read_mask(mask, 96, 96), 8, 64, 64, 4)
    outside = np.array(mask)
    outside[seen.box[0]:seen.box[2], seen.box[1]:seen.box[3]] = 0
    assert outside.max() <= 4
    assert np.abs(np.subtract(VaeImageProcessor.get_crop_region(mask, 64, 64, 4), seen.box)).max() <= 4
    specks = box_mask(96, 96, (36, 36, 60, 60))
    specks[::8, ::8] = np.maximum(specks[::8, ::8], 3)
    assert inpainting.window(inpainting.read_mask(specks, 96, 96), 8, 64, 64, 4).box == (32, 32, 64, 64)


# ── What stays ──────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("model", ["SD 1.5, 4", "SD 1.5, 9"])
@pytest.mark.parametrize("arguments", [{}, {"padding": 5}, {"height": 40}, {"strength": 0.5}], ids=str)
def test_outside_the_mask_every_byte_is_the_old_one(pipes, model, arguments):
    """On a picture of 61 × 83, by a mask that no grid fits; and it is painted up to the mask's own edge."""
    image, mask = painting(83, 61), box_mask(83, 61, (11, 6, 37, 29))
    ours, = inpaint(pipes[model], image, mask, output_type="pil", **arguments)
    old, new = np.asarray(image), np.asarray(ours)
    assert ours.size == (61, 83)
    np.testing.assert_array_equal(new[mask == 0], old[mask == 0])
    assert np.abs(new[mask > 0].astype(int) - old[mask > 0]).mean() > 5
    changed = np.argwhere((new != old).any(axis=-1))
    assert (*changed.min(axis=0), *(changed.max(axis=0) + 1)) == (11, 6, 37, 29)


def test_in_arrays_and_tensors_every_bit(pipe):
    image   = np.random.default_rng(0).random((64, 72, 3), dtype=np.float32)
    new     = inpaint(pipe, image)[0]
    outside = box_mask() == 0
    np.testing.assert_array_equal(new[outside], image[outside])
    tensor = inpaint(pipe, torch.from_numpy(image).permute(2, 0, 1), output_type="pt")
    np.testing.assert_array_equal(tensor[0].permute(1, 2, 0).numpy(), new)


def test_composite_false_shows_the_decoded_picture(pipe):
    whole  = inpaint(pipe, composite=False)[0]
    latent = inpaint(pipe, output_type="latent")
    np.testing.assert_array_equal(whole, ldm.images.to_numpy(ldm.images.to_unit(pipe.decode(latent)))[0])
    inside = box_mask() > 0
    np.testing.assert_array_equal(whole[inside], inpaint(pipe)[0][inside])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_outside_the_mask_are_those_of_the_picture(pipe, name):
    """Also where the last step ends at σ_min (pndm, dpm), and where each step adds noise."""
    latent = inpaint(pipe, scheduler=name, steps=5, strength=0.8, spacing=None, seed=8, output_type="latent")
    with torch.inference_mode():
        mean, std = pipe.encode(to_tensor(painting()) * 2 - 1)
    z       = mean + std * seeded([8], (4, 8, 9))(0)
    outside = torch.ones(8, 9, dtype=torch.bool)
    outside[2:6, 3:7] = False
    assert torch.equal(latent[..., outside], z[..., outside])
    assert (latent - z)[..., ~outside].abs().median() > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_keep_on_data_with_a_known_answer(name):
    """Outside the mask the network sees z + σ·noise, whatever the scheduler does; a deterministic one gets
    there by itself. Inside, where the data know nothing of what is outside, it is the run without a mask."""
    data, row = Gaussian(), SCHEDULERS[name]
    sigmas    = row.sigmas(oracles.SD_SCHEDULE, 12, config=oracles.SD)[4:]
    draws     = oracles.draws(20, (1, 4))
    mask      = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    z         = torch.tensor([[7.0, 8.0, 9.0, 10.0]], dtype=torch.float64)      # far from what the data hold
    options   = {**row.options(oracles.SD_SCHEDULE),
                 **({"noise": lambda i: draws[i + 1]} if row.stochastic else {})}
    seen: list[tuple[torch.Tensor, float]] = []

    def watched(x, sigma):
        seen.append((x, sigma))
        return data.denoise(x, sigma)

    def end(denoise):
        *_, x = row.function(denoise, z + sigmas[0] * draws[0], sigmas, **options)
        return x

    kept = end(inpainting.keep(watched, z, mask, draws[0], sigmas[0]))
    torch.testing.assert_close(kept[0, ::2], end(data.denoise)[0, ::2], rtol=1e-12, atol=1e-12)
    for x, sigma in seen:
        torch.testing.assert_close(x[0, 1::2], (z + sigma * draws[0])[0, 1::2], rtol=0, atol=1e-12)
    if not row.stochastic:
        torch.testing.assert_close(kept[0, 1::2], (z + sigmas[-1] * draws[0])[0, 1::2], rtol=0, atol=1e-11)


# ── What is painted ─────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ["pndm", "dpmpp_2m_sde"])
def test_a_full_mask_at_strength_one_leaves_nothing_of_the_picture(pipe, name):
    full = np.ones((64, 72), dtype=bool)
    one, other = (inpaint(pipe, painting(seed=seed), full, scheduler=name) for seed in (1, 2))
    np.testing.assert_array_equal(one, other)
    one, other = (inpaint(pipe, painting(seed=seed), full, scheduler=name, strength=0.5) for seed in (1, 2))
    assert np.abs(one - other).max() > 0.01


def test_a_full_mask_at_strength_one_is_text_to_image(pipe):
    """From a picture's second draw: the first is for the latents of what came in, as in diffusers."""
    def second(denoise, x, sigmas):
        return ldm.schedulers.euler(denoise, x / first * noise(1), sigmas)
    noise = seeded([4], (4, 8, 9))
    first = noise(0)
    ours  = inpaint(pipe, mask=np.ones((64, 72), dtype=bool), seed=4, scheduler=ldm.schedulers.euler)
    same  = ldm.sample("a red cat", pipe, seed=4, height=64, width=72, **{**QUICK, "scheduler": second})
    np.testing.assert_allclose(ours, same, atol=1e-4)


def test_strength_zero_paints_the_round_trip(pipe):
    with torch.inference_mode():
        mean, std = pipe.encode(to_tensor(painting()) * 2 - 1)
        trip = ldm.images.to_unit(pipe.decode(mean + std * seeded([0], (4, 8, 9))(0)))
    np.testing.assert_array_equal(inpaint(pipe, strength=0, composite=False), ldm.images.to_numpy(trip))


def test_a_soft_mask_blends_the_new_over_the_old(pipe):
    """The network paints what is ½ or more; the picture that comes out is weighed by the mask."""
    soft = (np.linspace(0, 1, 72)[None] * np.ones((64, 1))).astype(np.float32)
    old  = np.asarray(painting()).astype(np.float32) / 255
    new  = inpaint(pipe, mask=soft, composite=False)[0]
    np.testing.assert_allclose(inpaint(pipe, mask=soft)[0], old + soft[..., None] * (new - old), atol=1e-6)
    np.testing.assert_array_equal(new, inpaint(pipe, mask=soft >= 0.5, composite=False)[0])


def test_feather_fades_outwards_and_no_further(pipe):
    old = np.asarray(painting()).astype(np.float32) / 255
    new = inpaint(pipe, composite=False)[0]
    out = inpaint(pipe, feather=4)[0]
    rows, columns = np.mgrid[:64, :72]
    top, left, bottom, right = BOX
    distance = np.max([top - rows, rows - bottom + 1, left - columns, columns - right + 1], axis=0).clip(0, 5)
    alpha    = (1 - distance / 5)[..., None]
    np.testing.assert_allclose(out, old + alpha * (new - old), atol=1e-6)
    np.testing.assert_array_equal(out[distance == 5], old[distance == 5])


@pytest.mark.parametrize(("box", "cells"), [((19, 30, 20, 31), (16, 24, 24, 32)),
                                            ((15, 23, 17, 41), (8, 16, 24, 48))])
def test_a_mask_that_fits_no_cell_paints_all_cells_it_touches(pipe, box, cells):
    part, whole = (inpaint(pipe, mask=box_mask(box=each), composite=False) for each in (box, cells))
    np.testing.assert_array_equal(part, whole)


def test_a_thin_line_in_a_large_picture_is_not_lost(pipe):
    """Painted at a quarter of its size."""
    image, mask = painting(256, 288), box_mask(256, 288, (100, 40, 101, 240))
    out     = inpaint(pipe, image, mask, height=64, output_type="pil")[0]
    changed = (np.asarray(out) != np.asarray(image)).any(axis=-1)
    assert changed[mask > 0].mean() > 0.8
    assert not changed[mask == 0].any()


def test_only_masked_is_painted_at_the_models_own_size(pipe):
    """In a box of the model's proportions where the picture has room, else of its own; never stretched."""
    shapes = []

    def unet(x, *rest):
        shapes.append(tuple(x.shape[2:]))
        return pipe.unet(x, *rest)

    watched = replace(pipe, unet=unet)
    image       = painting(200, 30)
    low, corner = (box_mask(200, 30, box) for box in ((90, 5, 110, 20), (0, 0, 4, 4)))
    assert inpaint(watched, image, low, padding=8, output_type="pil")[0].size == (30, 200)
    assert set(shapes) == {(8, 7)}                  # 36 × 30 pixels at 64 × 53, filled up to 64 × 56
    shapes.clear()
    inpaint(watched, image, corner, padding=8, height=128)
    assert set(shapes) == {(16, 8)}                 # 12 × 12 pixels, grown to 24 × 12, at 128 × 64
    window = inpainting.window(inpainting.read_mask(low, 200, 30), 8, 64, 64, 8)
    assert (window.box, window.size) == ((82, 0, 118, 30), (64, 53))


def test_the_margin_repeats_the_edge():
    picture = torch.rand(1, 3, 61, 83, generator=torch.Generator().manual_seed(0))
    mask    = torch.ones(1, 1, 61, 83)
    window  = inpainting.window(mask, 8, None, None)
    part    = window.cut(picture)
    assert part.shape == (1, 3, 64, 88)
    assert torch.equal(part[..., :61, :83], picture)
    assert torch.equal(part[..., 61:, :83], picture[..., -1:, :].expand(-1, -1, 3, -1))
    assert torch.equal(part[..., :61, 83:], picture[..., -1:].expand(-1, -1, -1, 5))
    assert torch.equal(window.paste(part, torch.zeros_like(picture), mask), picture)


def test_outpainting():
    """With the model of the package: the new margins go on in the colour of the picture, without a seam."""
    prompt  = "a red circle on a blue background"
    image,  = ldm.sample(prompt, seed=3, steps=10)
    side    = image.width
    canvas  = PIL.Image.new("RGB", (side + 64, side), "grey")
    canvas.paste(image, (32, 0))
    mask    = PIL.Image.new("L", canvas.size, "white")
    mask.paste("black", (32, 0, side + 32, side))
    wide,   = ldm.inpaint(prompt, canvas, mask, seed=3, steps=10, feather=8)
    old, new = np.asarray(image).astype(int), np.asarray(wide).astype(int)
    np.testing.assert_array_equal(new[:, 40:side + 24], old[:, 8:-8])
    for margin, edge in ((new[:, :32], new[:, 40:48]), (new[:, side + 32:], new[:, side + 16:side + 24])):
        assert np.abs(margin.mean(axis=(0, 1)) - edge.mean(axis=(0, 1))).max() < 20
    seams = np.abs(np.diff(new, axis=1)).mean(axis=(0, 2))[[31, side + 31]]
    assert seams.max() < 4                                      # of 255 levels; of the grey canvas over 60


# ── Masks ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_masks_of_all_kinds(tmp_path):
    mask  = box_mask()
    truth = torch.from_numpy(mask > 0)[None, None].float()
    grey  = PIL.Image.fromarray(mask)
    drawn = PIL.Image.new("RGBA", grey.size, (255, 255, 255, 0))            # white on a transparent layer
    drawn.putalpha(grey)
    red   = PIL.Image.merge("RGB", [grey, PIL.Image.new("L", grey.size), PIL.Image.new("L", grey.size)])
    grey.save(tmp_path / "mask.png")
    for given in (grey, grey.convert("1"), grey.convert("RGB"), red, drawn, drawn.convert("LA"),
                  grey.convert("RGB").quantize(2), PIL.Image.fromarray(mask.astype(np.uint16) * 257),
                  tmp_path / "mask.png", str(tmp_path / "mask.png"),
                  mask, mask > 0, mask / 255, mask[..., None], np.repeat(mask[..., None], 3, axis=2),
                  truth[0, 0], truth[0], truth, truth[0, 0].bool(), truth.half(), torch.from_numpy(mask)):
        assert torch.equal(inpainting.read_mask(given, 64, 72), truth), given
    assert torch.equal(inpainting.read_mask([grey, truth[0, 0]], 64, 72), truth.expand(2, -1, -1, -1))
    assert torch.equal(inpainting.read_mask(255 - mask, 64, 72, invert=True), truth)
    hole = PIL.Image.fromarray(np.dstack([np.asarray(painting()), 255 - mask]))     # erased from the picture
    assert torch.equal(inpainting.read_mask(hole.getchannel("A"), 64, 72, invert=True), truth)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6                                                        # to be turned clockwise
    grey.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(inpainting.read_mask(tmp_path / "turned.png", 64, 72), truth)


def test_a_mask_of_another_size_is_fitted(pipe):
    large = np.kron(box_mask(), np.ones((3, 3), dtype=np.uint8))
    small = box_mask()[::8, ::8]
    for mask in (large, small):
        assert torch.equal(inpainting.read_mask(mask, 64, 72), inpainting.read_mask(box_mask(), 64, 72))
    rounded = inpainting.read_mask(torch.ones(333, 500), 667, 1000)         # 333.5 rows, had it been exact
    assert rounded.shape == (1, 1, 667, 1000)
    assert inpainting.read_mask(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 1, 1).item() == 0.75
    np.testing.assert_array_equal(inpaint(pipe, mask=small), inpaint(pipe))


def test_invert(pipe):
    np.testing.assert_array_equal(inpaint(pipe, mask=255 - box_mask(), invert=True), inpaint(pipe))


@pytest.mark.parametrize(("model", "name"), [("SD 1.5, 4", "pndm"), ("SD 1.5, 9", "euler_a")])
def test_a_picture_of_a_batch_is_the_same_alone(pipes, model, name):
    images, masks = [painting(seed=1), painting(seed=2)], [box_mask(), box_mask(box=(0, 0, 30, 72))]
    batch = inpaint(pipes[model], images, masks, ["a cat", "a dog"], scheduler=name, num_images=2, seed=4)
    alone = inpaint(pipes[model], images[1], masks[1], "a dog", scheduler=name, seed=7)
    np.testing.assert_allclose(batch[3:], alone, atol=1e-5)
    assert np.abs(batch[2] - batch[3]).max() > 0.01


# ── Errors ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("arguments", "error", "words"), [
    ({"mask": box_mask(72, 64)},           ValueError, "mask of 64 × 72 pixels does not fit.* of 72 × 64"),
    ({"mask": np.zeros((64, 72))},         ValueError, "mask is 0 at its highest.*invert=True"),
    ({"mask": np.full((64, 72), 0.4)},     ValueError, "mask is 0.4 at its highest"),
    ({"mask": np.full((64, 72), 7.0)},     ValueError, "mask cannot be used.*7"),
    ({"mask": np.full((64, 72), np.nan)},  ValueError, "mask cannot be used.*nan"),
    ({"mask": np.ones((1, 1, 1, 64, 72))}, ValueError, "mask cannot be used.*shape"),
    ({"mask": 3},                          TypeError,  "mask cannot be used.*int"),
    ({"mask": []},                         ValueError, "mask cannot be used.*list is empty"),
    ({"image": []},                        ValueError, "no picture: the list is empty"),
    ({"mask": [box_mask()] * 3},           ValueError, "3 pictures or masks for 1"),
    ({"mask": box_mask(64, 74)},           ValueError, "mask of 74 × 64 .* same proportions"),
    ({"image": [painting(), painting(8)]}, ValueError, "one size.*72, 64.*72, 8"),
    ({"strength": 1.5},                    ValueError, "strength is 1.5"),
    ({"feather": -1},                      ValueError, "feather is -1"),
    ({"padding": -1},                      ValueError, "padding is -1"),
    ({"padding": 2.5},                     ValueError, "padding is 2.5; it is a whole number"),
    ({"padding": 0.0},                     ValueError, "padding is 0.0; it is a whole number"),
    ({"feather": 2.0},                     ValueError, "feather is 2.0; it is a whole number"),
    ({"height": 60},                       ValueError, "height is 60"),
    ({"stregnth": 0.5},                    TypeError,  "stregnth"),
])
def test_arguments_that_make_no_sense(pipe, arguments, error, words):
    with pytest.raises(error, match=words):
        inpaint(pipe, **arguments)


def test_a_window_holds_the_padding_or_the_feather_whichever_is_wider(pipe):
    picture, mask = painting(96, 112), box_mask(96, 112, (40, 40, 72, 72))
    for padding, feather, reach in ((0, 8, 8), (16, 8, 16), (16, 0, 16)):
        done, = inpaint(pipe, picture, mask, padding=padding, feather=feather, composite=False,
                        output_type="pil")
        changed = (np.array(done) != np.array(picture)).any(axis=2).nonzero()
        assert [(axis.min(), axis.max() + 1) for axis in changed] == [(40 - reach, 72 + reach)] * 2


def test_models_for_other_tasks_say_so(tmp_path, pipes):
    with pytest.raises(ValueError, match=r"9 input channels.*ldm\.inpaint"):
        ldm.sample("a cat", pipes["SD 1.5, 9"])
    with pytest.raises(ValueError, match=r"9 input channels.*ldm\.inpaint"):
        ldm.img2img("a cat", painting(), pipes["SD 1.5, 9"])
    eight = ldm.load(tiny.write(tmp_path / "8", in_channels=8), device="cpu")
    with pytest.raises(ValueError, match=r"8 input channels.* 4, and 9 for inpainting"):
        inpaint(eight)


def test_few_steps_that_start_low_are_warned_of(pipe):
    with pytest.warns(UserWarning, match="starts at σ = 1.62 instead of 14.61"):
        inpaint(pipe, spacing="leading")
