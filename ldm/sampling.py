"""The convenience functions: a prompt in, pictures out. They can do nothing that the parts cannot.

Each is: encode the text, wrap the network in guidance, choose the σ's, start from noise, walk down, decode.
"""
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import guidance, images, schedulers
from .denoiser import Conditioning, Denoise, Denoiser
from .noise import Noise, seeded
from .noise_schedule import check_sigmas
from .pipeline import Pipeline, load

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Callback = Callable[[int, Tensor, Tensor], Any]     # (step, x, x̂₀)


def sample(prompt: str | Sequence[str], model: Pipeline | str | Path | None = None, *,
           negative_prompt: str | Sequence[str] = "", scheduler: str | schedulers.Scheduler | None = None,
           steps: int | None = None, guidance_scale: float | None = None, guidance_rescale: float = 0.0,
           guidance_interval: tuple[float, float] | None = None, seed: int | Sequence[int] = 0,
           num_images: int = 1, height: int | None = None, width: int | None = None,
           spacing: str | None = None, sigmas: Sequence[float] | None = None,
           timesteps: Sequence[float] | None = None, scheduler_options: Mapping[str, Any] | None = None,
           output_type: str = "pil", callback: Callback | None = None, progress: bool | None = None) -> Any:
    """Text to image.

    Args:
        prompt: a text, or a list of them. All pictures of a call are made in one batch.
        model: a Pipeline from `load`, or what `load` takes; None is the small model inside the package.
        negative_prompt: what guidance leads away from: one text, or one for each prompt.
        scheduler: a name of `ldm.schedulers.SCHEDULERS`, or a function (denoise, x, sigmas, …) that yields x.
        steps, guidance_scale: None is the model's own default.
        height, width: in pixels, multiples of 8 (of the autoencoder's `downscale`); None is the model's own.
        guidance_rescale: in [0, 1], see `guidance.rescaled`.
        guidance_interval: (low, high) in σ, see `guidance.interval`.
        seed: picture i has the seed seed + i, or the i-th of a list. The same seed is the same picture, made
            alone or in any batch, on any device, to rounding.
        num_images: pictures for each prompt.
        spacing: "leading", "trailing", "linspace", "karras", "exponential", "polyexponential" or "beta"; None
            is the model's own. Instead of steps and spacing: `sigmas`, falling, with the end of the last step
            (usually 0); or `timesteps`, falling, each a start of a step.
        scheduler_options: arguments of the scheduler's function, such as {"eta": 0.5} for "ddim".
        output_type: "pil": a list of Pillow pictures; "np": (N, H, W, 3) and "pt": (N, 3, H, W), both float32
            in [0, 1]; "latent": (N, 4, h, w), scaled.
        callback: is called as callback(step, x, x0) after step 1, 2, …: the state x = x₀ + σ·ε, and the
            newest estimate of x₀, both (N, 4, h, w). To stop early, raise an exception.
        progress: show a bar; None: on a terminal.

    Raises:
        ValueError, TypeError: an argument that makes no sense; and what `load` raises.
        torch.OutOfMemoryError: with what to change.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; there are {', '.join(map(repr, OUTPUT_TYPES))}.")
    prompts, negatives, seeds = _batch(prompt, negative_prompt, seed, num_images)
    pipe   = model if isinstance(model, Pipeline) else load(model)
    row    = schedulers.find(pipe.defaults.scheduler if scheduler is None else scheduler)
    scale  = pipe.defaults.guidance_scale if guidance_scale is None else guidance_scale
    shape  = _latent_shape(pipe, height, width)
    sigmas = _sigmas(pipe, row, steps, spacing, sigmas, timesteps)

    with torch.inference_mode(), _memory_advice(len(prompts), shape):
        cond     = pipe.text(prompts)
        uncond   = pipe.text(negatives) if scale != 1 else cond
        denoiser = Denoiser(pipe.unet, pipe.schedule, pipe.prediction, row.whole)
        denoise  = _guided(denoiser, cond, uncond, scale, guidance_rescale, guidance_interval)
        noise    = seeded(seeds, shape, cond.context.device)
        x        = noise(0) * row.start_scale(sigmas[0], spacing=spacing, config=pipe.scheduler_config)
        x        = _integrate(row, pipe, denoise, x, sigmas, lambda i: noise(i + 1),
                              scheduler_options, callback, progress)
        return _output(pipe, x / (1 + sigmas[-1]**2) ** 0.5, output_type)


def _batch(prompt: str | Sequence[str], negative: str | Sequence[str], seed: int | Sequence[int],
           num_images: int) -> tuple[list[str], list[str], list[int]]:
    """One prompt, one negative prompt and one seed for each picture."""
    for name, texts in (("prompt", prompt), ("negative_prompt", negative)):
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} is a text, or a list of texts; got {texts!r}.")
    prompts   = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts:
        raise ValueError("prompt is an empty list: there is nothing to make.")
    if len(negatives) != len(prompts):
        raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; "
                         f"give one, or one for each.")
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; it must be at least 1.")
    count = len(prompts) * num_images
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count or not all(isinstance(s, int) and 0 <= s < 2**64 for s in seeds):
        raise ValueError(f"seed is {seed!r}; give one integer from 0 to 2⁶⁴ − 1, "
                         f"or one for each of the {count} pictures.")
    return ([text for text in prompts for _ in range(num_images)],
            [text for text in negatives for _ in range(num_images)], seeds)


def _latent_shape(pipe: Pipeline, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(C, h, w) of the latents for a picture of height × width pixels."""
    unit, channels = pipe.vae.config.downscale, pipe.vae.config.latent_channels
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size < unit or size % unit):
            below, above = size // unit * unit, (size // unit + 1) * unit
            raise ValueError(f"{name} is {size}, but must be a multiple of {unit}: take "
                             f"{f'{below} or ' if below > 0 else ''}{above}.")
    config = getattr(pipe.unet, "config", None)                     # a network of one's own needs no config
    wanted = getattr(config, "in_channels", channels)
    if wanted != channels:
        raise ValueError(f"{pipe.name or 'The model'} has a U-Net with {wanted} input channels, made for "
                         f"inpainting or another task with a picture as input; text to image needs one with "
                         f"{channels}.")
    return channels, (height or pipe.defaults.height) // unit, (width or pipe.defaults.width) // unit


def _sigmas(pipe: Pipeline, row: schedulers.Row, steps: int | None, spacing: str | None,
            sigmas: Sequence[float] | None, timesteps: Sequence[float] | None) -> list[float]:
    """The σ's to walk: the caller's own, or by the row of the table and the model's file."""
    if (sum(choice is not None for choice in (sigmas, timesteps, steps)) > 1
            or spacing and (sigmas or timesteps)):
        raise ValueError("Give either steps (and spacing), or sigmas, or timesteps.")
    if sigmas is not None:
        return check_sigmas(sigmas)
    if timesteps is not None:
        return check_sigmas([*map(pipe.schedule.sigma, timesteps), 0.0])
    steps = pipe.defaults.steps if steps is None else steps
    found = row.sigmas(pipe.schedule, steps, spacing=spacing, config=pipe.scheduler_config)
    if found[0] < pipe.schedule.sigma_max / 4:
        warnings.warn(f"With {steps} steps this spacing starts at σ = {found[0]:.2f} instead of "
                      f"{pipe.schedule.sigma_max:.2f}, so there will be little to see; spacing='trailing' "
                      f"starts where the noise does.", stacklevel=3)
    return found


def _guided(denoiser: Denoiser, cond: Conditioning, uncond: Conditioning, scale: float, rescale: float,
            interval: tuple[float, float] | None) -> Denoise:
    if scale == 1:
        return guidance.unguided(denoiser, cond)
    denoise = (guidance.rescaled(denoiser, cond, uncond, scale, rescale) if rescale else
               guidance.classifier_free(denoiser, cond, uncond, scale))
    return guidance.interval(denoise, guidance.unguided(denoiser, cond), *interval) if interval else denoise


def _integrate(row: schedulers.Row, pipe: Pipeline, denoise: Denoise, x: Tensor, sigmas: list[float],
               noise: Noise, options: Mapping[str, Any] | None, callback: Callback | None,
               progress: bool | None) -> Tensor:
    """Runs the scheduler from x at sigmas[0] to the end, with a bar and the callback."""
    from tqdm import tqdm
    x0 = x

    def watched(x: Tensor, sigma: float) -> Tensor:
        nonlocal x0
        x0 = denoise(x, sigma)
        return x0

    arguments = {**row.options(pipe.schedule),
                 **({"noise": noise} if row.stochastic else {}),
                 **(options or {})}
    show = sys.stderr.isatty() if progress is None else progress
    states = row.function(watched, x, sigmas, **arguments)
    for step, x in enumerate(tqdm(states, total=len(sigmas) - 1, disable=not show), start=1):
        if callback is not None:
            callback(step, x, x0)
    return x


def _output(pipe: Pipeline, latents: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return latents
    pictures = images.to_unit(pipe.decode(latents))
    return {"pt": lambda x: x, "np": images.to_numpy, "pil": images.to_pil}[output_type](pictures)


@contextmanager
def _memory_advice(count: int, shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"The memory of the device does not suffice for {count} picture(s) "
            f"with latents of {shape[1]} × {shape[2]}. "
            f"Make fewer in one call, or smaller ones (height, width), or load the model in float16 (dtype), "
            f"or on another device. PyTorch says: {error}") from error
