"""Guidance: functions (denoiser, cond, uncond, …) → denoise(x, σ), with the conditioning bound inside.

Each returns the plain function that a scheduler calls. A guidance of your own is one more such function.
"""
import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoise, Denoiser


def unguided(denoiser: Denoiser, cond: Conditioning) -> Denoise:
    """D(x; σ, cond) as it is: one call of the network on N pictures."""
    return lambda x, sigma: denoiser(x, sigma, cond)


def distilled(denoiser: Denoiser, cond: Conditioning, scale: float) -> Denoise:
    """For a network that was taught what guidance results in, and is told the scale: Meng et al. 2022; LCM.

    One call of the network on N pictures. It was taught guidance away from the empty prompt, so it takes no
    negative one.
    """
    scales = torch.full((len(cond),), float(scale), device=cond.context.device)
    return unguided(denoiser, replace(cond, guidance=scales))


def classifier_free(denoiser: Denoiser, cond: Conditioning, uncond: Conditioning, scale: float) -> Denoise:
    """D = D_uncond + scale·(D_cond − D_uncond): Ho & Salimans 2022, Eq. 6.

    The scale is the paper's w + 1, the convention of Imagen (Saharia et al. 2022, Eq. 2). A scale of 1 is no
    guidance and costs none. `uncond` is the empty or the negative prompt.

    Both D are computed in one call of the network on 2N pictures; in two calls of N if the contexts differ in
    length, or from the moment that the memory is short.
    """
    if scale == 1:
        return unguided(denoiser, cond)
    both = _both(denoiser, cond, uncond)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        d_uncond, d_cond = both(x, sigma)
        return d_uncond + scale * (d_cond - d_uncond)
    return denoise


def rescaled(denoiser: Denoiser, cond: Conditioning, uncond: Conditioning, scale: float,
             rescale: float) -> Denoise:
    """Classifier-free guidance that does not overexpose: Lin et al. 2023, section 3.4, Eq. 14–16.

    The guided output of the network is scaled to the standard deviation of the conditional one, picture by
    picture, and mixed with the unscaled by `rescale` in [0, 1] (the paper's φ, there 0.7).
    """
    both = _both(denoiser.output, cond, uncond)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        f_uncond, f_cond = both(x, sigma)
        guided = f_uncond + scale * (f_cond - f_uncond)
        axes   = tuple(range(1, x.ndim))                                                    # of each picture
        factor = f_cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
        return denoiser.to_x0(guided * (rescale * factor + (1 - rescale)), x, sigma)
    return denoise


def interval(guided: Denoise, plain: Denoise, low: float, high: float) -> Denoise:
    """Guidance only where low < σ ≤ high: Kynkäänniemi et al. 2024, Eq. 6.

    Outside, `plain` costs half as much. Each call is decided by its own σ. So in a step of several calls
    (Heun, Runge-Kutta) that crosses a bound, some are guided and others not; the authors' code has one choice
    for all calls of a step.
    """
    return lambda x, sigma: (guided if low < sigma <= high else plain)(x, sigma)


def switch(above: Denoise, below: Denoise, sigma: float) -> Denoise:
    """The ensemble of expert denoisers (Balaji et al. 2022, "eDiff-I"): `above` for levels ≥ sigma, else
    `below`.

    So Stable Diffusion XL hands over to its refiner within *one* run of one scheduler, whose history goes on.
    """
    return lambda x, s: (above if s >= sigma else below)(x, s)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was short. On the CPU and on MPS, PyTorch has no class of its own for this error."""
    return (isinstance(error, torch.OutOfMemoryError)
            or re.search("out of memory|can't allocate memory|not enough memory", str(error)) is not None)


def _both(function: Callable[[Tensor, float, Conditioning], Tensor], cond: Conditioning,
          uncond: Conditioning) -> Callable[[Tensor, float], list[Tensor]]:
    """(x, σ) → [function for uncond, function for cond]; in one batch until the memory runs out."""
    if len(cond) != len(uncond):
        raise ValueError(f"{len(cond)} prompts but {len(uncond)} negative prompts; "
                         f"one of these for each is needed.")
    joint = Conditioning.cat([uncond, cond]) if uncond.context.shape == cond.context.shape else None

    def evaluate(x: Tensor, sigma: float) -> list[Tensor]:
        nonlocal joint
        if joint is not None:
            try:
                return list(function(torch.cat([x, x]), sigma, joint).chunk(2))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                joint = None
        return [function(x, sigma, part) for part in (uncond, cond)]
    return evaluate
