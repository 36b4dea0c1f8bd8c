"""The convenience functions: a prompt in, pictures out. They can do nothing that the parts cannot.

A task is a start state, a slice of the σ's, and a wrapper of the denoiser; the rest is shared: `run.py`.

    function            starts from             σ's              denoises by
    sample              √(1 + σ₀²)·noise (*)    all              the guided network
    img2img             z + σ_k·noise           from σ_k         the guided network
    inpaint             one of these            from σ_k         `keep` around the guided network
      with 9 channels   one of these            from σ_k         the guided network, which is told the rest

(*) or σ₀·noise, as the scheduler has it (`Row.start_scale`).
"""
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from . import images, inpainting, schedulers
from .pipeline import Pipeline
from .run import Callback, Run, check_strength, one_input, prepare, takes_mask
from .sizes import Sizes


def sample(prompt: str | Sequence[str], model: Pipeline | str | Path | None = None, *,
           negative_prompt: str | Sequence[str] = "", scheduler: str | schedulers.Scheduler | None = None,
           steps: int | None = None, guidance_scale: float | None = None, guidance_rescale: float = 0.0,
           guidance_interval: tuple[float, float] | None = None, seed: int | Sequence[int] = 0,
           num_images: int = 1, height: int | None = None, width: int | None = None,
           spacing: str | None = None, sigmas: Sequence[float] | None = None,
           timesteps: Sequence[float] | None = None, scheduler_options: Mapping[str, Any] | None = None,
           sizes: Sizes = Sizes(), negative_sizes: Sizes | None = None,
           refiner: Pipeline | str | Path | None = None, handover: float = 0.8,
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
            alone or in any batch, on any device, to rounding (which on CUDA is TF32's in convolutions of
            float32, unless `torch.backends.cudnn.allow_tf32` is False).
        num_images: pictures for each prompt.
        spacing: "leading", "trailing", "linspace", "karras", "exponential", "polyexponential" or "beta";
            None: as the model's file says, where the scheduler heeds it, else as is usual for the scheduler
            (`SCHEDULERS`). Instead of steps and spacing: `sigmas`, falling, with the end of the last step
            (usually 0), none above the schedule's `sigma_max`, as the network knows no more noise; or
            `timesteps`, falling, each a start of a step.
        scheduler_options: arguments of the scheduler's function, such as {"eta": 0.5} for "ddim"; or "noise":
            a function i → the fresh noise of step i, (N, 4, h, w), for one that takes it.
        sizes, negative_sizes: what Stable Diffusion XL is told about the picture, see `Sizes`. The second,
            with the negative prompt, is the first where it is None.
        refiner: a second model that takes over for the last part of the run (Stable Diffusion XL's refiner).
        handover: in (0, 1]: the part of the times of training, from the noisy end, that is the first model's.
        output_type: "pil": a list of Pillow pictures; "np": (N, H, W, 3) and "pt": (N, 3, H, W), both float32
            in [0, 1]; "latent": (N, 4, h, w), scaled; of a run that ends at σ > 0, x / √(1 + σ²).
        callback: is called as callback(step, x, x0) after step 1, 2, …: the state x = x₀ + σ·ε, and the
            newest estimate of x₀, both (N, 4, h, w). To stop early, raise an exception.
        progress: show a bar; None: on a terminal.

    Raises:
        ValueError, TypeError: an argument that makes no sense; and what `load` raises.
        FloatingPointError: the network's numbers are not finite, by float16 or a broken file.
        torch.OutOfMemoryError: with what to change.
    """
    run = prepare(_options(**locals()))
    one_input(run.pipe, "text to image")
    return _from_noise(run)


def _from_noise(run: Run) -> Any:
    with run.working():
        noise = run.noise()
        x     = run.walk(run.denoise(), run.start(noise(0), stacklevel=4), run.sigmas,
                         lambda i: noise(i + 1))
        return run.output(x)


def img2img(prompt: str | Sequence[str], image: Any, model: Pipeline | str | Path | None = None, *,
            strength: float = 0.8, height: int | None = None, width: int | None = None,
            **options: Any) -> Any:
    """Image to image (Meng et al. 2021, "SDEdit"): noise on a picture, and from there on as in `sample`.

    Args:
        prompt, model: as for `sample`.
        image: a Pillow picture, a path, an array or a tensor: all that `images.read` takes. One for all, or
            one for each prompt.
        strength: the part of the run that is done, in [0, 1]. Of N steps it is the last n = N·strength,
            rounded to the nearest whole number, halves up; they start from the picture with noise of
            sigmas[N − n], which is the σ at the start of the first of them. At 0 nothing is done: the result
            is the picture after a round trip through the autoencoder. At 1 nothing of the picture remains:
            the result is that of `sample`, exactly.
        height, width: in pixels, multiples of 8. None: the picture's own size, less what is over a multiple
            of 8. Else it is scaled and cropped, but never stretched: see `images.fit`.
        options: all others of `sample`. `steps` is N, of which `strength` takes a part.

    Raises:
        All that `sample` raises. Also a ValueError: a picture that cannot
            be used, or a strength too small for a single step.
    """
    check_strength(strength)
    given    = images.read(image)                       # before a model is loaded, which may take minutes
    run      = prepare(_options(prompt, model, height=height, width=width, **options))
    one_input(run.pipe, "image to image")
    pictures = run.each(images.fit(given, height, width, run.unit))
    run      = replace(run, size=(pictures.shape[2], pictures.shape[3]))
    if strength == 1:
        return _from_noise(run)
    sigmas = run.last(strength)
    with run.working():
        noise     = run.noise()
        mean, std = run.pipe.encode(pictures * 2 - 1)
        z = mean + std * noise(0)
        if strength == 0:
            return run.output(z)
        x = run.walk(run.denoise(), z + sigmas[0] * noise(1), sigmas, lambda i: noise(i + 2))
        return run.output(x)


def inpaint(prompt: str | Sequence[str], image: Any, mask: Any, model: Pipeline | str | Path | None = None,
            *, strength: float = 1.0, invert: bool = False, padding: int | None = None, feather: int = 0,
            composite: bool = True, height: int | None = None, width: int | None = None,
            **options: Any) -> Any:
    """Inpainting: the white part of a mask is painted anew. With any model, or with one made for it.

    What comes back is of the picture's own size, whatever that is, and where the mask is black every pixel is
    the picture's own. Grey is painted too from ½ on; all grey is a blend of the new picture and the old one.

    Args:
        prompt, model: as for `sample`.
        image: as for `img2img`. One for all, or one for each prompt.
        mask: all that `images.read` takes, of the picture's size or its proportions; a colour counts by its
            brightest channel, what is transparent is black. One for all, or one for each prompt.
        strength: as for `img2img`. At 1 nothing of what is under the mask remains.
        invert: the black part is painted anew.
        padding: for small things in large pictures: the network sees only the part around the mask, with so
            many pixels more on each side, scaled to the model's own size and back.
        feather: fade from the new picture to the old one, over so many pixels outside the mask. It belongs to
            the composite: with composite=False there is none.
        composite: False shows all that came out of the autoencoder, which has changed every pixel a little.
        height, width: of what the network sees, at most; multiples of 8. It keeps its proportions. None: the
            picture's own, or with `padding` the model's.
        options: all others of `sample`.

    Raises:
        All that `img2img` raises. Also a ValueError: a mask that does not
            fit the picture, or that has nothing to paint.
    """
    for name, pixels in (("padding", 0 if padding is None else padding), ("feather", feather)):
        if not isinstance(pixels, int | np.integer) or pixels < 0:
            raise ValueError(f"{name} is {pixels}; it is a whole number of pixels, 0 or more.")
    check_strength(strength)
    given = images.read(image)
    if len({picture.shape for picture in given}) != 1:
        raise ValueError("The pictures of one call must be of one size, not of (width, height) = "
                         f"{', '.join(str(tuple(picture.shape[:0:-1])) for picture in given)}.")
    masks    = inpainting.read_mask(mask, given[0].shape[1], given[0].shape[2], invert)
    run      = prepare(_options(prompt, model, height=height, width=width, **options))
    told     = takes_mask(run.pipe)
    pictures = run.each(torch.stack(given))
    masks    = run.each(masks)
    window   = (inpainting.window(masks, run.unit, height, width) if padding is None else
                inpainting.window(masks, run.unit, *run.size, max(padding, feather)))
    part, hole = window.cut(pictures) * 2 - 1, window.cut_mask(masks)
    run        = replace(run, size=(part.shape[2], part.shape[3]))
    sigmas     = run.last(strength)
    with run.working():
        noise     = run.noise()
        k         = 0 if told and strength == 1 else 1      # z is not needed there: diffusers draws none
        mean, std = run.pipe.encode(part)
        z, first  = mean + std * noise(0), noise(k)
        grid      = inpainting.cells(hole, *z.shape[-2:]).to(z.device)
        concat    = None
        if told:
            mean, std = run.pipe.encode(part * (1 - hole))  # a middle grey, as in its training
            concat    = torch.cat([grid.expand(len(z), -1, -1, -1), mean + std * noise(k + 1)], dim=1)
        denoise = run.denoise(concat)
        if not told:
            denoise = inpainting.keep(denoise, z, grid, first, sigmas[0])
        x = run.start(first) if strength == 1 else z + sigmas[0] * first
        x = run.walk(denoise, x, sigmas, lambda i: noise(i + k + 2)) if strength > 0 else z
        x = x if told else torch.lerp(z, x, grid)
        if run.options.output_type == "latent":
            return x
        painted = images.to_unit(run.pipe.decode(x)).cpu()
        alpha   = inpainting.feathered(masks, feather) if composite else torch.ones_like(masks)
        return run.show(window.paste(painted, pictures, alpha).to(x.device))


def _options(prompt: str | Sequence[str], model: Pipeline | str | Path | None,
             **options: Any) -> SimpleNamespace:
    """All options of a run, of which `sample` knows names and defaults."""
    bound = inspect.signature(sample).bind(prompt, model, **options)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)
