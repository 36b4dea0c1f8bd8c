"""The loss side: from clean latents to the number that training makes small.

Everything is in the units of the library: a noisy latent is x = x₀ + σ·ε with σ = √((1−ᾱ)/ᾱ), and the network
sees it scaled to unit variance, x / √(1+σ²) = √ᾱ·x₀ + √(1−ᾱ)·ε, which is the x_t of DDPM. A training step is
four lines:

    t     = sample_timesteps(len(latents), generator=generator).to(latents.device)
    words = drop_captions(text, empty_text, 0.1, generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    loss  = denoising_loss(unet, latents, noise, t, sigmas[t], words, prediction="v_prediction")

with a generator on the CPU and the schedule's σ's beside the latents; and `EMA` keeps the weights that are
used in the end. Shapes: N batch; latents (N, C, h, w); t and σ (N,); text (N, S, D).

Ho et al. 2020 (DDPM); Salimans & Ho 2022 (v); Hang et al. 2023 (min-SNR); Ho & Salimans 2022 (classifier-free
guidance); Guttenberg 2023 (offset noise).
"""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import check_prediction


def sample_timesteps(count: int, total: int = 1000, noisy_share: float = 0.0, noisy_from: int = 800,
                     generator: torch.Generator | None = None) -> Tensor:
    """Whole timesteps (count,) in [0, total): uniform, but for a share of `noisy_share` that is uniform in
    [noisy_from, total). ValueError: a share of which there are none.

    What stands where is decided at the noisiest timesteps, and a small model learns "above" and "below" in a
    fraction of the time when 20–30 % of its training is spent there.
    """
    if noisy_share and not 0 <= noisy_from < total:
        raise ValueError(f"noisy_from is {noisy_from}; of {total} timesteps it must be one.")
    uniform = torch.rand(2, count, generator=generator)
    first   = torch.where(uniform[0] < noisy_share, float(noisy_from), 0.0)
    times   = (first + uniform[1] * (total - first)).long()
    return times.clamp(max=total - 1)               # the largest uniform numbers are rounded up to `total`


def drop_captions(text: Tensor, empty: Tensor, probability: float,
                  generator: torch.Generator | None = None) -> Tensor:
    """Replaces the states of some captions (N, S, D) by those of the empty one (1, S, D): the network also
    learns the unconditional score that classifier-free guidance subtracts (Ho & Salimans 2022, Algorithm 1).
    """
    dropped = torch.rand(len(text), generator=generator).to(text.device) < probability
    return torch.where(dropped[:, None, None], empty, text)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = x₀ + σ·ε for σ (N,): DDPM's Eq. 4 divided by √ᾱ."""
    return x0 + _wide(sigma, x0) * noise


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Adds to each channel of each sample, (N, C, h, w), a constant from N(0, strength²) (Guttenberg 2023,
    "Diffusion with offset noise").

    The last timestep is not noise alone: with Stable Diffusion's βs it still holds .068 of the picture, and
    the mean over all h·w points shows it through noise whose own mean is only 1/√(h·w). A network that has
    learned to look there takes the mean of the pure noise that sampling begins with for that of a picture
    neither dark nor bright (Lin et al. 2023, who change the schedule instead). A random offset hides so small
    a trace: choose a `strength` above .068 times the usual size of the channel means of the latents.
    """
    offsets = torch.randn(noise.shape[:2], generator=generator).to(noise)
    return noise + strength * offsets[..., None, None]                                  # (N, C, 1, 1)


def target(prediction: str, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What the network should answer: ε, x₀, or v = √ᾱ·ε − √(1−ᾱ)·x₀ = (ε − σ·x₀)/√(1+σ²) (Salimans & Ho
    2022, appendix D). ValueError: `prediction` is none of `denoiser.PREDICTIONS`.
    """
    check_prediction(prediction)
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    return (noise - _wide(sigma, x0) * x0) * _wide((1 + sigma**2) ** -0.5, x0)


def min_snr_weight(prediction: str, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Loss weights (N,) of Hang et al. 2023, sections 3.4 and 4.2: min(SNR, γ) on the error of x₀,
    where SNR = 1/σ².

    An error e of x₀ is an error e·√SNR of ε and e·√(SNR+1) of v, hence the divisors. Mind what it does to the
    noisiest timesteps: 0.014 at t = 900 under v-prediction with Stable Diffusion's βs. Without weights all
    timesteps count alike. ValueError: `prediction` is none of `denoiser.PREDICTIONS`.
    """
    check_prediction(prediction)
    snr = 1 / sigma**2
    divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisors[prediction]


def denoising_loss(network: Callable[..., Tensor], x0: Tensor, noise: Tensor, t: Tensor, sigma: Tensor,
                   text: Tensor, prediction: str, weight: Tensor | None = None) -> Tensor:
    """The weighted mean squared error of network(x / √(1+σ²), t, text), a scalar (DDPM Eq. 14, for any
    prediction).

    `t` (N,) and `sigma` (N,) are the same noise level twice: as the network is told it, and as the noise is
    scaled. `weight` (N,), if given, multiplies each sample's error.
    """
    scaled = add_noise(x0, noise, sigma) * _wide((1 + sigma**2) ** -0.5, x0)
    answer = network(scaled, t, text)
    error  = (answer.to(x0.dtype) - target(prediction, x0, noise, sigma)).square().flatten(1).mean(1)   # (N,)
    return (error if weight is None else weight * error).mean()


class EMA:
    """An exponential moving average of a module's parameters: after step i, average += (1 − d)·(parameters −
    average).

    The decay d grows from 0.1 towards `decay`, as min(decay, (1 + i)/(10 + i)), so that the first, untrained
    weights are forgotten. Sampling with the average is like sampling after the learning rate was lowered, at
    no cost.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.module  = module
        self.decay   = decay
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the module's present parameters in; `step` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.module.named_parameters():
            self.average[name].lerp_(p.detach(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the average and the module's parameters; call it again to change back."""
        for name, p in self.module.named_parameters():
            kept = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(kept)


def _wide(sigma: Tensor, x: Tensor) -> Tensor:
    """(N,) → (N, 1, 1, 1) in the type of x. Square σ before: float16 ends below 256²."""
    return sigma.to(x).view(-1, *[1] * (x.ndim - 1))
