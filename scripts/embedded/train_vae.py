"""Stage 1: the autoencoder, from pictures alone.

The loss is L1 + 2 MSE on pixels + L1 on their differences (edges are what the eye sees first) + a weak KL
term. It begins with crops, four times cheaper and as instructive for the convolutions, and ends with whole
pictures, as it will be used.

`polish` goes on with the decoder alone, which leaves the latents as they are: the U-Net can be trained
before, or meanwhile when its scenes are encoded.
"""

from pathlib import Path
from random import Random

import torch
from common import draw, once, pixels, run, sheet
from export import load_vae
from torch import Tensor
from train_unet import emphasis, scene_latents, training_scene
from world import Thing, random_scene

from ldm.models.vae import VAE, VAEConfig
from ldm.weights import write_network

CONFIG = VAEConfig(channels=(16, 32, 64, 64), layers=1, groups=8, scaling_factor=1.0, force_upcast=False)
BATCH = 16
TESTS = 90_000_000         # the seed of the scenes that are measured; no step trains on it
KL_WEIGHT = 2e-5
CROPPED = .4                    # share of the steps with crops
NOISE = .04               # on the latents, in their standard deviations: the U-Net's will not be exact either
ROUGH = .2                      # at most this much of it in `polish`,
STRENGTH = .1                   # where latents are also multiplied by 1 ± this, a standard deviation
WINDOWS = .8                    # share of the steps of `polish` with windows


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


def psnr(decoded: Tensor, images: Tensor) -> float:
    """Mean over the pictures of 10·log10(2² / MSE): values lie in [-1, 1], the decoded ones are clipped to
    it."""
    return (10 * torch.log10(4 / (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)))).mean().item()


def train(out: Path, steps: int, size: int, device: str) -> None:
    torch.manual_seed(0)
    vae = VAE(CONFIG).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(.9, .99), weight_decay=.01)
    rng = Random(TESTS)
    test = pixels([random_scene(rng) for _ in range(32)], size).to(device)

    def step(i: int) -> dict[str, Tensor]:
        rng = Random(draw(i))
        noise = torch.Generator().manual_seed(draw(i))
        cropped = i < CROPPED * steps
        images = pixels([random_scene(rng) for _ in range(BATCH if cropped else BATCH // 2)], size)
        if cropped:                                                   # each at a place of its own
            corners = [(rng.randrange(size // 2 + 1), rng.randrange(size // 2 + 1)) for _ in images]
            images = torch.stack([window_of(image, corner, 1)
                                  for image, corner in zip(images, corners, strict=True)])
        images = images.to(device, memory_format=torch.channels_last)
        mean, std = vae.encode(images)
        spread = (std.square() + (NOISE * mean.detach().std()).square()).sqrt()
        decoded = vae.decode(mean + spread * torch.randn(mean.shape, generator=noise).to(device))
        kl = .5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        fit = reconstruction_loss(decoded, images)
        return {"loss": fit + KL_WEIGHT * kl, "fit": fit, "kl": kl}

    @torch.no_grad()
    def report(_: int) -> str:
        decoded = torch.cat([vae.decode(vae.encode(images)[0]) for images in test.split(8)])
        sheet(torch.stack([test[:16], decoded[:16]], 1).flatten(0, 1), 8, out / "vae.png")
        return f"PSNR {psnr(decoded, test):.2f} dB"

    run(out / "vae.pt", {"vae": vae, "optimiser": optimiser}, steps, 2e-3, step, report, every=200)
    once(lambda: save_scaled(vae, out / "vae", size))


@torch.no_grad()
def save_scaled(vae: VAE, folder: Path, size: int) -> None:
    """Measures the latents' standard deviation and saves the autoencoder with the scaling factor that makes
    it one."""
    rng = Random(TESTS + 1)
    device = next(vae.parameters()).device
    latents = torch.cat([vae.encode(pixels([random_scene(rng)], size).to(device))[0] for _ in range(256)])
    factor = round(vae.config.scaling_factor / latents.std().item(), 5)
    write_network(vae, folder, torch.float32, scaling_factor=factor, sample_size=size)
    print(f"scaling factor {factor}", flush=True)


def window(thing: Thing, side: int, rng: Random) -> tuple[int, int]:
    """The left and upper edge of a window around the thing, half as wide as its picture of `side` latents."""
    return tuple(min(max(int(side * (c - .25)) + rng.randint(-side // 10, side // 10), 0), side // 2)
                 for c in (thing.x, thing.y))


def window_of(picture: Tensor, corner: tuple[int, int], scale: int) -> Tensor:
    """What of a picture (C, h, h), `scale` pixels a latent, lies in the window from this corner on."""
    left, top = (scale * c for c in corner)
    half = scale * (picture.shape[-1] // scale // 2)
    return picture[:, top:top + half, left:left + half]


def polish(out: Path, steps: int, count: int, size: int, device: str) -> None:
    """Trains the decoder alone, on latents of the U-Net's first `count` training scenes, made wrong as the
    U-Net's may be: with noise, and too strong or too weak, as guidance leaves them. Single, small and
    pointed things are drawn more often, as for the U-Net.

    It begins with windows around things: most of a picture is background, which is soon right.
    """
    vae = load_vae(out / "vae").to(device, memory_format=torch.channels_last)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(.9, .99), weight_decay=.01)
    latents = scene_latents(vae, out, count, size, device)
    all_scenes = [training_scene(k) for k in range(count)]
    weights = torch.tensor([emphasis(scene, True) for scene in all_scenes])
    rng = Random(TESTS)
    test = pixels([random_scene(rng) for _ in range(32)], size).to(device)
    with torch.no_grad():
        test_latents = torch.cat([vae.encode(images)[0] for images in test.split(8)])

    def step(i: int) -> dict[str, Tensor]:
        rng, generator = Random(draw(i)), torch.Generator().manual_seed(draw(i))
        windowed = i < WINDOWS * steps
        chosen = torch.multinomial(weights, BATCH if windowed else BATCH // 2, replacement=True,
                                   generator=generator)
        scenes = [all_scenes[k] for k in chosen.tolist()]
        images, z = pixels(scenes, size), latents[chosen].float()
        if windowed:
            corners = [window(rng.choice(scene.things), z.shape[-1], rng) for scene in scenes]
            z, images = (torch.stack([window_of(a, corner, whole.shape[-1] // z.shape[-1])
                                      for a, corner in zip(whole, corners, strict=True)])
                         for whole in (z, images))
        each = (len(z), 1, 1, 1)
        factor = 1 + STRENGTH * torch.randn(each, generator=generator)
        amount = ROUGH * torch.rand(each, generator=generator)
        z = factor * z + amount * torch.randn(z.shape, generator=generator)
        return {"loss": reconstruction_loss(vae.decode(z.to(device)), images.to(device))}

    @torch.no_grad()
    def report(_: int) -> str:
        decoded = torch.cat([vae.decode(z) for z in test_latents.split(8)])
        sheet(torch.stack([test[:16], decoded[:16]], 1).flatten(0, 1), 8, out / "vae.png")
        return f"PSNR {psnr(decoded, test):.2f} dB"

    run(out / "polish.pt", {"vae": vae, "optimiser": optimiser}, steps, 1e-3, step, report, every=100)
    once(lambda: write_network(vae, out / "vae", torch.float32, sample_size=size))
