"""Methods of first order. In the units x = x₀ + σ·ε these samplers are one line, a step of Euler's, or that
step with fresh noise.

    DDIM (η = 0)  =  Euler's method
    DDPM          =  DDIM with η = 1  =  Euler ancestral

They differ only in which σ's they visit. With them is `lcm`, for networks that were taught to go the whole
way in one step.
"""
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Denoise


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Euler's method on dx/dσ = (x − D(x; σ))/σ.

    The equation is EDM's (Karras et al. 2022, Eq. 1 and 3). A step is that of DDIM with η = 0: Song et al.
    2020, Eq. 13 and 14.
    """
    for sigma, following in pairwise(sigmas):
        eps = (x - denoise(x, sigma)) / sigma
        x   = x + (following - sigma) * eps
        yield x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Callable[[int], Tensor],
                    eta: float = 1.0) -> Iterator[Tensor]:
    """DDIM with η in [0, 1] (Song et al. 2020, Eq. 12 and 16); η = 1 is DDPM (Ho et al. 2020, Algorithm 2).

    Instead of going down to σ' it goes further, to σ_down, and comes back up with fresh noise of σ_up, such
    that σ_down² + σ_up² = σ'². With σ_up² = η²·σ'²(σ² − σ'²)/σ² this is, for η = 1, the exact posterior
    q(x'|x, x₀) with D for x₀ (DDPM Eq. 6 and 7: the variance is β̃).

    noise: i → standard normal like x, for step i = 0, 1, …
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is in [0, 1]; got {eta}.")
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        up   = eta * following * (1 - (following / sigma) ** 2) ** 0.5
        down = (following**2 - up**2) ** 0.5
        eps  = (x - denoise(x, sigma)) / sigma
        x    = x + (down - sigma) * eps
        if up > 0:
            x = x + up * noise(i)
        yield x


def lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float],
        noise: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """Multistep consistency sampling: Song et al. 2023, Algorithm 1, with its smallest σ, their ε, at zero.

    For latent consistency models (Luo et al. 2023), which do not answer with the mean x₀, but with the end of
    the solution through x. A step goes all the way there, and comes back up with fresh noise of σ'.

    In theirs, a part ¼/((10·t)² + ¼) of x_vp is mixed into D, so that D(x; 0) = x. Down to t = 19, the least
    time that the published models were taught, it is at most 7e-6, and it is left out here.

    noise: i → standard normal like x, for step i = 0, 1, …
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        x = denoise(x, sigma)
        if following > 0:
            x = x + following * noise(i)
        yield x
