"""Lesson 4. Steering a run.    python docs/lessons/4_steering.py

A scheduler only ever asks `denoise(x, σ)`: what is the picture? Whoever wraps that function steers the run.
Here the left half of the picture is made to follow the right one, and a gradient makes the whole brighter.
Writes steering.png.
"""
import torch

import ldm
from ldm import guidance, images, schedulers

pipe     = ldm.load(device="cpu")
denoiser = ldm.Denoiser(pipe.unet, pipe.schedule, pipe.prediction)
text     = pipe.text(["a yellow star on a gray background"])
denoise  = guidance.classifier_free(denoiser, text, pipe.text([""]), scale=3.0)
sigmas   = pipe.schedule.sigmas(12, "trailing")
side     = pipe.defaults.height // 8
start    = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)) * (1 + sigmas[0]**2)**0.5


def symmetric(x, sigma):
    x0 = denoise(x, sigma)
    return torch.cat([x0[..., side // 2:].flip(-1), x0[..., side // 2:]], dim=-1)


def brighter(x, sigma):
    """Moves x̂₀ along the gradient of its brightness: guidance by whatever can be differentiated."""
    x0 = denoise(x, sigma).detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(pipe.vae.decode(x0).mean(), x0)
    return x0.detach() + 0.3 * gradient / gradient.abs().mean()


ends, pictures = [], []
for wrapped in (denoise, symmetric, brighter):
    with torch.no_grad():
        *_, x = schedulers.dpm_solver_pp(wrapped, start, sigmas)
        ends.append(x)
        pictures.append(pipe.decode(x))
        print(f"{wrapped.__name__:10} brightness {images.to_unit(pictures[-1]).mean():.2f}")
images.grid(images.to_pil(images.to_unit(torch.cat(pictures))), columns=3).save("steering.png")
