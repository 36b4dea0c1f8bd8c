"""Stages 3 and 4: the U-Net, on latents encoded beforehand, with captions written afresh each time a scene
comes by; first its inner levels, on pictures of half the size (`grow.py`).

v-prediction with a uniform weight; more timesteps than one in five are drawn from the noisiest fifth, where
the layout is decided, until it is learned; and then more from the clearest two fifths, where outlines are.
The noise has an offset, for sampling begins with noise alone (`training.offset_noise`). Half of the scenes
may have `MORE_SHAPES`, so that no colour goes without a large part of all shapes, nor a shape without a large
part of the colours: that is how combinations never seen stay possible.
"""

from pathlib import Path
from random import Random

import numpy as np
import torch
from common import draw, native_bfloat16, once, pixels, run, save, sheet
from torch import Tensor
from train_text import tokens
from transformers import CLIPTextModel, CLIPTokenizer
from world import MORE_SHAPES, SHAPES, Scene, Thing, caption, forget, random_scene

from ldm import training
from ldm.denoiser import Conditioning, Denoiser
from ldm.guidance import classifier_free
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE
from ldm.noise_schedule import NoiseSchedule
from ldm.schedulers import dpm_solver_pp

INNER = UNetConfig(channels=(64, 128, 192), layers=1, depth=(1, 1, 1), heads=(4, 4, 4), groups=8,
                   context_dim=128)
EMA_DECAY = .998
CLEAR = 400                     # the clearest two fifths of the timesteps are those below
VISIBLE = 600                   # below this timestep the noise does not hide how large a thing is
POINTED = {"star": 8., "cross": 2., "triangle": 2.}     # hard to draw: their weight, see `emphasis`
DROPPED = .1                    # captions replaced by the empty one
OFFSET = .15                    # of the noise; white latents have means of up to .12 at the last timestep
SCENE_SEED = 20_000_000
PROMPTS = (
    "a red circle on a blue background",             "a large yellow star",
    "a small green square on a white background",    "a black heart on a pink background",
    "a purple triangle",                             "a blue ring on a yellow background",
    "an orange diamond on a black background",       "a white cross on a red background",
    "a red square above a blue circle",              "a blue circle above a red square",
    "a green triangle to the left of a yellow heart", "a yellow heart to the left of a green triangle",
    "a pink star below a gray ring on a black background",
    "a white circle to the right of a black square on a green background",
    "a striped orange square on a gray background",  "a dotted blue heart on a white background",
    "a red circle at the top left on a white background",
    "a small black star at the bottom right on a yellow background",
    "a large green circle and a small red diamond",
    "a purple cross under a white heart on a blue background",
    "two shapes: a red star and a blue diamond",     "a green star on a purple background",
    "a big shiny pink circle on a dark background",  "a yellow ring over an orange cross",
)


def training_scene(k: int) -> Scene:
    """Scene k of the training set."""
    return random_scene(Random(SCENE_SEED + k), shapes=SHAPES + MORE_SHAPES if k % 2 else SHAPES)


def encode_scenes(vae: VAE, out: Path, count: int, size: int, device: str) -> None:
    """Writes latents_SIZE.pt: (count, 4, h, w), float16, standard deviation near one; in pieces."""
    path, chunk = out / f"latents_{size}.pt", 1024
    latents = torch.load(path, weights_only=True) if path.exists() else torch.empty(0, dtype=torch.half)
    while len(latents) < count:
        numbers = range(len(latents), min(count, len(latents) + chunk))
        scenes = [training_scene(k) for k in numbers]
        with torch.no_grad():
            new = [vae.encode(pixels(scenes[i:i + 32], size).to(device))[0].cpu().half()
                   for i in range(0, len(scenes), 32)]
        latents = torch.cat([latents, *new])
        save(latents, path)
        print(f"encoded {len(latents)}/{count}", flush=True)


def scene_latents(vae: VAE, out: Path, count: int, size: int, device: str) -> Tensor:
    """The latents of the training scenes 0 to `count` - 1, encoded if they are not yet there."""
    once(lambda: encode_scenes(vae, out, count, size, device))
    return torch.load(out / f"latents_{size}.pt", weights_only=True)[:count]


def emphasis(scene: Scene, visible: bool) -> float:
    """How often a scene is drawn, relative to others: a single thing twice as often, for pairs are more
    frequent and yet soon learned. And once its sizes are visible, small things twice as often, which are few
    pixels of the loss, and things with points and arms as often as `POINTED` says; of two things, the harder
    one decides."""
    def difficulty(thing: Thing) -> float:
        return POINTED.get(thing.shape, 1.) * (2. if thing.size == "small" else 1.)
    return (3. - len(scene.things)) * (max(map(difficulty, scene.things)) if visible else 1.)


def timesteps(count: int, noisy: float, clear: float, generator: torch.Generator) -> Tensor:
    """A share `clear` from below CLEAR alone, `noisy` of the others from the noisiest fifth alone."""
    return torch.where(torch.rand(count, generator=generator) < clear,
                       training.sample_timesteps(count, total=CLEAR, generator=generator),
                       training.sample_timesteps(count, noisy_share=noisy, generator=generator))


def choose(t: Tensor, visible: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The number of a scene for each timestep, by their weights where sizes are visible, and by others where
    they are not, for there what a caption leaves unsaid has to keep its share."""
    return torch.where(t < VISIBLE, *(torch.multinomial(w, len(t), replacement=True, generator=generator)
                                      for w in (visible, hidden)))


def in_bfloat16(device: str) -> bool:
    """Whether products are computed in it: where the machine has instructions for it. Weights are float32."""
    return device.startswith("cuda") or native_bfloat16()


def new_optimiser(unet: UNet) -> torch.optim.AdamW:
    return torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(.9, .99), weight_decay=.01, fused=True)


def averaged(path: Path, unet: UNet) -> UNet:
    """The U-Net with the average of the weights in a checkpoint."""
    unet.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["ema"])
    return unet


def train(path: Path, unet: UNet, vae: VAE, steps: int, count: int, size: int, batch: int, rate: float,
          noisy: float, clear: float, seed: int, device: str) -> None:
    """Trains to `path`, a checkpoint, on `batch` pictures a step and process; `rate` is the highest learning
    rate, `noisy` and `clear` are the shares of `timesteps`, `seed` decides what is drawn."""
    out = path.parent
    latents = scene_latents(vae, out, count, size, device)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(out / "text_encoder").to(device).eval()
    unet = unet.to(device, memory_format=torch.channels_last)
    on_gpu, rough = device.startswith("cuda"), in_bfloat16(device)
    network = torch.compile(unet) if on_gpu else unet
    ema = training.EMA(unet, EMA_DECAY)
    optimiser = new_optimiser(unet)
    schedule = NoiseSchedule.scaled_linear()
    sigmas = torch.from_numpy(schedule.table.astype(np.float32))

    @torch.no_grad()
    def states(captions: list[str]) -> Tensor:
        return encoder(tokens(tokenizer, captions).to(device)).last_hidden_state

    empty, prompted = states([""]), states(list(PROMPTS))
    all_scenes = [training_scene(k) for k in range(len(latents))]
    weights = [torch.tensor([emphasis(s, visible) for s in all_scenes]) for visible in (True, False)]

    def step(i: int) -> dict[str, Tensor]:
        number = 1_000_000 * (1000 * seed + size) + draw(i)     # other samples at each seed and size
        generator, rng = torch.Generator().manual_seed(number), Random(30_000_000 + number)
        t = timesteps(batch, noisy, clear, generator)
        chosen = choose(t, *weights, generator)
        x0 = latents[chosen].float().to(device)
        text = states([caption(forget(all_scenes[k], rng), rng) for k in chosen.tolist()])
        text = training.drop_captions(text, empty, DROPPED, generator)
        noise = torch.randn(x0.shape, generator=generator)
        noise = training.offset_noise(noise, OFFSET, generator).to(device)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=rough):
            loss = training.denoising_loss(network, x0, noise, t.to(device), sigmas[t].to(device), text,
                                           "v_prediction")
        return {"loss": loss}

    @torch.no_grad()
    def report(i: int) -> str:
        if i % (5 * EVERY) and i != steps:
            return ""
        ema.swap()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(PROMPTS), *latents.shape[1:], generator=generator).to(device)
        denoise = classifier_free(Denoiser(unet, schedule, "v_prediction"), Conditioning(prompted),
                                  Conditioning(empty.expand_as(prompted)), 3.0)
        levels = schedule.sigmas(20, "trailing")
        *_, x = dpm_solver_pp(denoise, noise * (1 + levels[0] ** 2) ** .5, levels)
        sheet(torch.cat([vae.decode(z) for z in x.split(8)]), 6, path.with_suffix(".png"))
        ema.swap()
        return "sheet written"

    run(path, {"unet": unet, "ema": ema, "optimiser": optimiser}, steps, rate, step, report, EVERY)


EVERY = 100
