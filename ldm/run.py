"""A run, from options to pictures: what the tasks of `sampling` share.

`prepare` checks the options of `sample` and loads what is not loaded; a `Run` is what follows from them.
"""
import itertools
import math
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import guidance, images, schedulers
from .denoiser import Denoise, Denoiser
from .models import VAE, UNetConfig
from .models.vae import Decoder
from .noise import Noise, seeded
from .noise_schedule import check_sigmas
from .pipeline import Pipeline, finite, load

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Callback = Callable[[int, Tensor, Tensor], Any]     # (step, x, x̂₀)


@dataclass(frozen=True)
class Run:
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
        steps = len(self.sigmas) - 1
        taken = math.floor(round(steps * strength, 6) + 0.5)    # first to 6 digits: 50 × 0.29 is 14.4999999…
        if strength > 0 and taken == 0:
            raise ValueError(f"strength {strength} of {steps} steps is less than half a step, so nothing is "
                             f"done: take more steps, or a strength of at least {0.5 / steps:.3g}, or 0.")
        return self.sigmas[steps - taken:]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Without gradients, and with advice where the memory does not suffice. (Not in inference mode: what
        is made there cannot later be trained on, or changed in place.)"""
        try:
            with torch.no_grad():
                yield
        except RuntimeError as error:
            if not guidance.out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(advice(self.pipe, len(self.prompts), *self.size, error)) from error

    def noise(self) -> Noise:
        """k → the k-th draw of each picture, like its latents."""
        height, width = self.size
        shape = self.pipe.vae.config.latent_channels, height // self.unit, width // self.unit
        return seeded(self.seeds, shape, self.pipe.device)

    def start(self, noise: Tensor, stacklevel: int = 3) -> Tensor:
        """The state x that is noise alone. Warns where the σ's start so low that it should not be."""
        if self.sigmas[0] < min(self.pipe.schedule.sigma_max, 15) / 4:      # at 15 a picture is 7 % of x_vp
            warnings.warn(f"The run starts at σ = {self.sigmas[0]:.2f} instead of "
                          f"{self.pipe.schedule.sigma_max:.2f}, so there will be little to see; "
                          f"spacing='trailing' starts where the noise does.", stacklevel=stacklevel)
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
        if isinstance(states, Tensor):
            raise TypeError("The scheduler returned a tensor; it is to be a generator, which yields x after "
                            "each step.")
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


def prepare(o: SimpleNamespace) -> Run:
    """Checks the options, which are the arguments of `sample`; loads what is not loaded."""
    if o.output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {o.output_type!r}; there are {', '.join(map(repr, OUTPUT_TYPES))}.")
    if not 0 < o.handover <= 1:
        raise ValueError(f"handover is {o.handover}; it is the first model's part, above 0 and up to 1.")
    if not 0 <= o.guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is {o.guidance_rescale}; it is a degree, from 0 to 1.")
    if o.guidance_interval is not None and not _rising(o.guidance_interval):
        raise ValueError(f"guidance_interval is {o.guidance_interval!r}; it is (low, high) in σ.")
    prompts, negatives, seeds = _batch(o.prompt, o.negative_prompt, o.seed, o.num_images)
    pipe    = o.model if isinstance(o.model, Pipeline) else load(o.model)
    refiner = o.refiner if isinstance(o.refiner, Pipeline | None) else load(o.refiner, device=pipe.device)
    if refiner is not None:
        _check_refiner(pipe, refiner)
    scale = pipe.defaults.guidance_scale if o.guidance_scale is None else o.guidance_scale
    if scale == 0:
        warnings.warn("guidance_scale=0 follows the negative prompt alone; no guidance, which the cards of "
                      "some models call 0.0, is 1 here.", stacklevel=3)
    if ((_guides_itself(pipe) or scale == 1)
            and (any(negatives) or o.negative_sizes or o.guidance_rescale or o.guidance_interval)):
        why = (f"{pipe.name or 'The model'} was taught guidance away from the empty prompt"
               if _guides_itself(pipe) else "guidance_scale=1 is without guidance")
        warnings.warn(f"{why}, so negative_prompt, negative_sizes, guidance_rescale and guidance_interval "
                      f"have no effect.", stacklevel=3)
    row = schedulers.find(pipe.defaults.scheduler if o.scheduler is None else o.scheduler)
    return Run(o, pipe, refiner, row, scale, _sigmas(pipe, row, o.steps, o.spacing, o.sigmas, o.timesteps),
               prompts, negatives, seeds, _size(pipe, o.height, o.width))


def _rising(interval: Any) -> bool:
    try:
        low, high = interval
        return bool(0 <= low < high)
    except (TypeError, ValueError):
        return False


def check_strength(strength: float) -> None:
    """ValueError: it is no part of a run."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it is a part of the run, from 0 to 1.")


def _guides_itself(pipe: Pipeline) -> bool:
    """Whether the U-Net was taught guidance, as latent consistency models are."""
    return getattr(getattr(pipe.unet, "config", None), "guidance_dim", None) is not None


def _check_refiner(pipe: Pipeline, refiner: Pipeline) -> None:
    """ValueError: the one cannot go on where the other stops."""
    one_input(refiner, "a refiner")
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
        if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):      # half of a letter
            raise ValueError(f"{name} is not Unicode: {texts!r}. Was it typed or read in another encoding?")
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
        seeds = ([operator.index(one) for one in seed]              # (a tensor without axes is iterable)
                 if isinstance(seed, Iterable) and getattr(seed, "ndim", 1) > 0 else
                 [operator.index(seed) + i for i in range(count)])  # type: ignore[arg-type]
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
        if not isinstance(size, int | np.integer | None):
            raise ValueError(f"{name} is {size!r}; it is a whole number of pixels.")
        if size is not None and (size < unit or size % unit):
            below, above = size // unit * unit, max(size // unit + 1, 1) * unit
            raise ValueError(f"{name} is {size}, but must be a multiple of {unit}: take "
                             f"{f'{below} or ' if below > 0 else ''}{above}.")
    return height or pipe.defaults.height, width or pipe.defaults.width


def takes_mask(pipe: Pipeline) -> bool:
    """Whether the U-Net is one for inpainting. ValueError: it is for something else again."""
    channels = pipe.vae.config.latent_channels
    config   = getattr(pipe.unet, "config", None)                   # a network of one's own needs no config
    wanted   = getattr(config, "in_channels", channels)
    if isinstance(config, UNetConfig) and wanted not in (channels, 2 * channels + 1):
        raise ValueError(f"{pipe.name or 'The model'} has a U-Net with {wanted} input channels, made for a "
                         f"task that ldm does not know; it knows {channels}, and {2 * channels + 1} for "
                         f"inpainting.")
    return bool(wanted == 2 * channels + 1)


def one_input(pipe: Pipeline, task: str) -> None:
    """ValueError: the U-Net wants more than x, so it cannot do this task."""
    if takes_mask(pipe):
        channels = pipe.vae.config.latent_channels
        raise ValueError(f"{pipe.name or 'The model'} has a U-Net with {2 * channels + 1} input channels, "
                         f"made for inpainting: use ldm.inpaint; {task} needs one with {channels}.")


def advice(pipe: Pipeline, count: int, height: int, width: int, error: RuntimeError) -> str:
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
            or spacing and (sigmas is not None or timesteps is not None)):
        raise ValueError("Give either steps (and spacing), or sigmas, or timesteps.")
    if sigmas is not None:
        return check_sigmas(sigmas)
    if timesteps is not None:
        times = [float(t) for t in timesteps]
        last  = len(pipe.schedule) - 1
        if (not times or any(a <= b for a, b in itertools.pairwise(times))
                or not 0 <= times[-1] <= times[0] <= last):
            raise ValueError(f"timesteps must be falling numbers between {last} and 0, at least one; "
                             f"got {times}.")
        return check_sigmas([*map(pipe.schedule.sigma, times), 0.0])
    return row.sigmas(pipe.schedule, pipe.defaults.steps if steps is None else steps,
                      spacing=spacing, config=pipe.scheduler_config)
