"""The convenience functions: a prompt in, pictures out. They can do nothing that the parts cannot.

A task is a start state, a slice of the σ's, and a wrapper of the denoiser; the rest is `_Run`, shared by all.

    function            starts from             σ's              denoises by
    sample              √(1 + σ₀²)·noise        all              the guided network
    img2img             z + σ_k·noise           from σ_k         the guided network
    inpaint             one of these            from σ_k         `keep` around the guided network
      with 9 channels   one of these            from σ_k         the guided network, which is told the rest
"""
import inspect
import itertools
import math
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import guidance, images, inpainting, schedulers
from .denoiser import Denoise, Denoiser
from .models import VAE, UNetConfig
from .models.vae import Decoder
from .noise import Noise, seeded
from .noise_schedule import check_sigmas
from .pipeline import Pipeline, finite, load
from .sizes import Sizes

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Callback = Callable[[int, Tensor, Tensor], Any]     # (step, x, x̂₀)


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
            alone or in any batch, on any device, to rounding.
        num_images: pictures for each prompt.
        spacing: "leading", "trailing", "linspace", "karras", "exponential", "polyexponential" or "beta"; None
            is the model's own. Instead of steps and spacing: `sigmas`, falling, with the end of the last step
            (usually 0); or `timesteps`, falling, each a start of a step.
        scheduler_options: arguments of the scheduler's function, such as {"eta": 0.5} for "ddim".
        sizes, negative_sizes: what Stable Diffusion XL is told about the picture, see `Sizes`. The second,
            with the negative prompt, is the first where it is None.
        refiner: a second model that takes over for the last part of the run (Stable Diffusion XL's refiner).
        handover: in (0, 1]: the part of the times of training, from the noisy end, that is the first model's.
        output_type: "pil": a list of Pillow pictures; "np": (N, H, W, 3) and "pt": (N, 3, H, W), both float32
            in [0, 1]; "latent": (N, 4, h, w), scaled.
        callback: is called as callback(step, x, x0) after step 1, 2, …: the state x = x₀ + σ·ε, and the
            newest estimate of x₀, both (N, 4, h, w). To stop early, raise an exception.
        progress: show a bar; None: on a terminal.

    Raises:
        ValueError, TypeError: an argument that makes no sense; and what `load` raises.
        torch.OutOfMemoryError: with what to change.
    """
    run = _prepare(**locals())
    _one_input(run.pipe, "text to image")
    with run.working():
        noise = run.noise()
        x     = run.walk(run.denoise(), run.start(noise(0)), run.sigmas, lambda i: noise(i + 1))
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
        ValueError, TypeError, torch.OutOfMemoryError: as `sample`. Also a ValueError: a picture that cannot
            be used, or a strength too small for a single step.
    """
    run      = _prepare(prompt, model, height=height, width=width, **options)
    _one_input(run.pipe, "image to image")
    pictures = run.each(images.fit(images.read(image), height, width, run.unit))
    height, width = pictures.shape[-2:]
    if strength == 1:
        return sample(prompt, run.pipe, height=height, width=width, **{**options, "refiner": run.refiner})
    run, sigmas = replace(run, size=(height, width)), run.last(strength)
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
        ValueError, TypeError, torch.OutOfMemoryError: as `img2img`. Also a ValueError: a mask that does not
            fit the picture, or that has nothing to paint.
    """
    for name, pixels in (("padding", padding or 0), ("feather", feather)):
        if pixels < 0:
            raise ValueError(f"{name} is {pixels}; it is a number of pixels, 0 or more.")
    run   = _prepare(prompt, model, height=height, width=width, **options)
    told  = _takes_mask(run.pipe)
    given = images.read(image)
    if len({picture.shape for picture in given}) != 1:
        raise ValueError("The pictures of one call must be of one size, not of (width, height) = "
                         f"{', '.join(str(tuple(picture.shape[:0:-1])) for picture in given)}.")
    pictures = run.each(torch.stack(given))
    masks    = run.each(inpainting.read_mask(mask, pictures.shape[2], pictures.shape[3], invert))
    window   = (inpainting.window(masks, run.unit, height, width) if padding is None else
                inpainting.window(masks, run.unit, *run.size, max(padding, feather)))
    part, hole = window.cut(pictures) * 2 - 1, window.cut_mask(masks)
    run        = replace(run, size=(part.shape[2], part.shape[3]))
    sigmas     = run.last(strength)
    with run.working():
        noise     = run.noise()
        k         = 0 if told and strength == 1 else 1      # for z, diffusers draws only where it is needed
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


@dataclass(frozen=True)
class _Run:
    """What `sample`, `img2img` and `inpaint` share: the options, checked, and all that follows from them."""
    options:   SimpleNamespace          # the arguments of `sample`
    pipe:      Pipeline
    refiner:   Pipeline | None
    row:       schedulers.Row
    scale:     float                    # of guidance
    sigmas:    list[float]              # of the whole run
    prompts:   list[str]                # one for each picture, as are the next two
    negatives: list[str]
    seeds:     list[int]
    size:      tuple[int, int]          # (height, width) in pixels

    @property
    def unit(self) -> int:
        """Pixels on one side of a latent."""
        return self.pipe.vae.config.downscale

    def each(self, pictures: Tensor) -> Tensor:
        """Pictures that came in: one stays one; one for each prompt → one for each picture that is made."""
        prompts = len(self.prompts) // self.options.num_images
        if len(pictures) not in (1, prompts):
            raise ValueError(f"{len(pictures)} pictures or masks for {prompts} prompt(s): give one, or one "
                             f"for each prompt, which may be a list of the same text many times.")
        return pictures if len(pictures) == 1 else pictures.repeat_interleave(self.options.num_images, dim=0)

    def last(self, strength: float) -> list[float]:
        """The σ's of the last part of the run, see `img2img`. ValueError: not one step for a strength > 0."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it is a part of the run, from 0 to 1.")
        steps = len(self.sigmas) - 1
        taken = math.floor(round(steps * strength, 6) + 0.5)    # first to 6 digits: 50 × 0.29 is 14.4999999…
        if strength > 0 and taken == 0:
            raise ValueError(f"strength {strength} of {steps} steps is less than half a step, so nothing is "
                             f"done: take more steps, or a strength of at least {0.5 / steps:.3g}, or 0.")
        return self.sigmas[steps - taken:]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Without gradients, and with advice where the memory does not suffice."""
        try:
            with torch.inference_mode():
                yield
        except RuntimeError as error:
            if not guidance.out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(_advice(self.pipe, len(self.prompts), *self.size, error)) from error

    def noise(self) -> Noise:
        """k → the k-th draw of each picture, like its latents."""
        height, width = self.size
        shape = self.pipe.vae.config.latent_channels, height // self.unit, width // self.unit
        return seeded(self.seeds, shape, self.pipe.device)

    def start(self, noise: Tensor) -> Tensor:
        """The state x that is noise alone. Warns where the σ's start so low that it should not be."""
        if self.sigmas[0] < self.pipe.schedule.sigma_max / 4:
            warnings.warn(f"The run starts at σ = {self.sigmas[0]:.2f} instead of "
                          f"{self.pipe.schedule.sigma_max:.2f}, so there will be little to see; "
                          f"spacing='trailing' starts where the noise does.", stacklevel=3)
        return noise * self.row.start_scale(self.sigmas[0], spacing=self.options.spacing,
                                            config=self.pipe.scheduler_config)

    def denoise(self, concat: Tensor | None = None) -> Denoise:
        """The guided network; where there is a refiner, that one below the σ of the hand-over.

        concat: (N, C, h, w), for a network that wants more channels than x has.
        """
        first = self._guided(self.pipe, concat)
        if self.refiner is None:
            return first
        times = len(self.pipe.schedule)
        sigma = self.pipe.schedule.sigma(round(times - times * self.options.handover))
        return guidance.switch(first, self._guided(self.refiner), sigma)

    def _guided(self, pipe: Pipeline, concat: Tensor | None = None) -> Denoise:
        o        = self.options
        denoiser = Denoiser(pipe.unet, pipe.schedule, pipe.prediction, self.row.whole)
        cond     = replace(pipe.condition(self.prompts, *self.size, o.sizes), concat=concat)
        if _guides_itself(pipe):
            return guidance.distilled(denoiser, cond, self.scale)
        if self.scale == 1:
            return guidance.unguided(denoiser, cond)
        uncond   = replace(pipe.condition(self.negatives, *self.size, o.negative_sizes or o.sizes,
                                          negative=True), concat=concat)
        denoise  = (guidance.rescaled(denoiser, cond, uncond, self.scale, o.guidance_rescale)
                    if o.guidance_rescale else
                    guidance.classifier_free(denoiser, cond, uncond, self.scale))
        return (guidance.interval(denoise, guidance.unguided(denoiser, cond), *o.guidance_interval)
                if o.guidance_interval else denoise)

    def walk(self, denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
        """Runs the scheduler from x at sigmas[0] to the end, with a bar and the callback → latents."""
        from tqdm import tqdm
        o, x0 = self.options, x

        def watched(x: Tensor, sigma: float) -> Tensor:
            nonlocal x0
            x0 = denoise(x, sigma)
            return x0

        arguments = {**self.row.options(self.pipe.schedule),
                     **({"noise": noise} if self.row.stochastic else {}),
                     **({"skipped": len(self.sigmas) - len(sigmas)} if self.row.takes("skipped") else {}),
                     **(o.scheduler_options or {})}
        show   = sys.stderr.isatty() if o.progress is None else o.progress
        states = self.row.function(watched, x, sigmas, **arguments)
        for step, x in enumerate(tqdm(states, total=len(sigmas) - 1, disable=not show), start=1):
            if o.callback is not None:
                o.callback(step, x, x0)
        x_vp = x / (1 + sigmas[-1]**2) ** 0.5       # so noise that is left at the end adds no variance
        return finite(x_vp, "U-Net")

    def output(self, latents: Tensor) -> Any:
        """The result, as the caller asked for it."""
        if self.options.output_type == "latent":
            return latents
        return self.show(images.to_unit(self.pipe.decode(latents)))

    def show(self, pictures: Tensor) -> Any:
        """Pictures (N, 3, H, W) in [0, 1] as "pt", "np" or "pil"."""
        kinds = {"pt": lambda x: x, "np": images.to_numpy, "pil": images.to_pil}
        return kinds[self.options.output_type](pictures)


def _prepare(prompt: str | Sequence[str], model: Pipeline | str | Path | None, **options: Any) -> _Run:
    """Checks the options, of which `sample` knows names and defaults; loads what is not loaded."""
    bound = inspect.signature(sample).bind(prompt, model, **options)
    bound.apply_defaults()
    o = SimpleNamespace(**bound.arguments)
    if o.output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {o.output_type!r}; there are {', '.join(map(repr, OUTPUT_TYPES))}.")
    if not 0 < o.handover <= 1:
        raise ValueError(f"handover is {o.handover}; it is the first model's part, above 0 and up to 1.")
    prompts, negatives, seeds = _batch(prompt, o.negative_prompt, o.seed, o.num_images)
    pipe    = model if isinstance(model, Pipeline) else load(model)
    refiner = o.refiner if isinstance(o.refiner, Pipeline | None) else load(o.refiner, device=pipe.device)
    if refiner is not None:
        _check_refiner(pipe, refiner)
    scale = pipe.defaults.guidance_scale if o.guidance_scale is None else o.guidance_scale
    if scale == 0:
        warnings.warn("guidance_scale=0 follows the negative prompt alone; no guidance, which the cards of "
                      "some models call 0.0, is 1 here.", stacklevel=3)
    if _guides_itself(pipe) and (any(negatives) or o.guidance_rescale or o.guidance_interval):
        warnings.warn(f"{pipe.name or 'The model'} was taught guidance away from the empty prompt, so "
                      "negative_prompt, guidance_rescale and guidance_interval have no effect.", stacklevel=3)
    row = schedulers.find(pipe.defaults.scheduler if o.scheduler is None else o.scheduler)
    return _Run(o, pipe, refiner, row, scale, _sigmas(pipe, row, o.steps, o.spacing, o.sigmas, o.timesteps),
                prompts, negatives, seeds, _size(pipe, o.height, o.width))


def _guides_itself(pipe: Pipeline) -> bool:
    """Whether the U-Net was taught guidance, as latent consistency models are."""
    return getattr(getattr(pipe.unet, "config", None), "guidance_dim", None) is not None


def _check_refiner(pipe: Pipeline, refiner: Pipeline) -> None:
    """ValueError: the one cannot go on where the other stops."""
    _one_input(refiner, "a refiner")
    differ = f"The model {pipe.name} and the refiner {refiner.name}"
    if not np.array_equal(pipe.schedule.betas, refiner.schedule.betas):
        raise ValueError(f"{differ} were trained with different noise schedules, so the one cannot go on "
                         f"where the other stops.")
    configs = [getattr(p.unet, "config", None) for p in (pipe, refiner)]
    if len({config.vector_dim is None for config in configs if isinstance(config, UNetConfig)}) == 2:
        raise ValueError(f"{differ} know different latents: only one of them is a Stable Diffusion XL.")
    if pipe.device != refiner.device:
        raise ValueError(f"{differ} are on different devices, {pipe.device} and {refiner.device}.")


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
    if not isinstance(num_images, int | np.integer) or num_images < 1:
        raise ValueError(f"num_images is {num_images!r}; it is a whole number of pictures, at least 1.")
    count = len(prompts) * num_images
    try:                                                            # integers of any kind: NumPy's too
        seeds = ([operator.index(one) for one in seed] if isinstance(seed, Iterable) else
                 [operator.index(seed) + i for i in range(count)])
    except TypeError:
        seeds = []
    if len(seeds) != count or not all(0 <= s < 2**64 for s in seeds):
        raise ValueError(f"seed is {seed!r}; give one integer from 0 to 2⁶⁴ − 1, "
                         f"or one for each of the {count} pictures.")
    return ([text for text in prompts for _ in range(num_images)],
            [text for text in negatives for _ in range(num_images)], seeds)


def _size(pipe: Pipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) of the pictures in pixels."""
    unit = pipe.vae.config.downscale
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size < unit or size % unit):
            below, above = size // unit * unit, (size // unit + 1) * unit
            raise ValueError(f"{name} is {size}, but must be a multiple of {unit}: take "
                             f"{f'{below} or ' if below > 0 else ''}{above}.")
    return height or pipe.defaults.height, width or pipe.defaults.width


def _takes_mask(pipe: Pipeline) -> bool:
    """Whether the U-Net is one for inpainting. ValueError: it is for something else again."""
    channels = pipe.vae.config.latent_channels
    config   = getattr(pipe.unet, "config", None)                   # a network of one's own needs no config
    wanted   = getattr(config, "in_channels", channels)
    if wanted not in (channels, 2 * channels + 1):
        raise ValueError(f"{pipe.name or 'The model'} has a U-Net with {wanted} input channels, made for a "
                         f"task that ldm does not know; it knows {channels}, and {2 * channels + 1} for "
                         f"inpainting.")
    return wanted != channels


def _one_input(pipe: Pipeline, task: str) -> None:
    """ValueError: the U-Net wants more than x, so it cannot do this task."""
    if _takes_mask(pipe):
        channels = pipe.vae.config.latent_channels
        raise ValueError(f"{pipe.name or 'The model'} has a U-Net with {2 * channels + 1} input channels, "
                         f"made for inpainting: use ldm.inpaint; {task} needs one with {channels}.")


def _advice(pipe: Pipeline, count: int, height: int, width: int, error: RuntimeError) -> str:
    """What was asked for, what there was, and what helps, the least loss first, with estimates."""
    def size(number: float) -> str:
        return f"{number / 1e9:.3g} GB"
    vae, device = pipe.vae, pipe.device
    parts   = [[*part.parameters()] for part in (pipe.unet, vae) if isinstance(part, torch.nn.Module)]
    weights = [sum(weight.nbytes for weight in part) for part in parts]
    dtype   = next(itertools.chain(*parts)).dtype
    tried   = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    free    = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
    helps   = ["fewer pictures in one call: a step takes memory in proportion" if count > 1 else
               "a smaller picture (height, width): memory goes with the number of pixels, at least"]
    if dtype == torch.float32:
        half = "bfloat16" if device.type == "cpu" else "float16"
        helps.append(f'ldm.load(…, dtype="{half}"): half of everything, {size(sum(weights) / 2)} are weights')
    if isinstance(vae, VAE) and isinstance(vae.decoder, Decoder):
        maps = 3 * max(vae.config.channels[:2]) * height * width * next(vae.parameters()).itemsize
        helps.append(f"ldm.fast.tiled(pipeline.vae): a decode in about {size(maps / 2)}, not {size(maps)}")
    if device.type != "cpu":
        helps.append(f"ldm.fast.offload: one part on the device at a time, the largest {size(max(weights))}")
    return (f"Out of memory for {count} picture(s) of {width} × {height} pixels in "
            f"{str(dtype).removeprefix('torch.')}{f'; tried to get {tried[1]}' if tried else ''}"
            f"{f'; free are {size(free[0])} of {size(free[1])}' if free else ''}. What helps: "
            f"{'; or '.join(helps)}. PyTorch says: {error}")


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
    return row.sigmas(pipe.schedule, pipe.defaults.steps if steps is None else steps,
                      spacing=spacing, config=pipe.scheduler_config)
