"""Heun's method: the predictor is an Euler step, the corrector averages the slopes of both its ends."""
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Denoise


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Callable[[int], Tensor] | None = None,
         churn: float = 0.0, churn_min: float = 0.0, churn_max: float = float("inf"),
         churn_noise: float = 1.0, skipped: int = 0) -> Iterator[Tensor]:
    """EDM Algorithm 2 (Karras et al. 2022), which is its Algorithm 1 when churn is 0.

    Second order; two calls of the network a step, one in the last step when that ends at σ = 0.

    churn, churn_min, churn_max, churn_noise: the paper's S_churn, S_tmin, S_tmax and S_noise. With churn,
        each step from a σ in [churn_min, churn_max] first raises the noise to σ̂ = σ(1 + γ), where
        γ = min(churn/steps, √2 − 1).
    noise: i → standard normal like x, for step i; without it, a churn > 0 is a ValueError.
    skipped: how many steps of a longer run lie before `sigmas`; they count among those that share the churn.
    """
    steps = len(sigmas) - 1 + skipped
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        if churn > 0 and churn_min <= sigma <= churn_max:
            if noise is None:
                raise ValueError("heun with churn > 0 needs `noise`, a function i → standard normal like x.")
            raised = sigma * (1 + min(churn / steps, 2**0.5 - 1))
            x      = x + (raised**2 - sigma**2) ** 0.5 * churn_noise * noise(i)
            sigma  = raised
        slope = (x - denoise(x, sigma)) / sigma
        if following > 0:
            ahead = x + (following - sigma) * slope
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
        x = x + (following - sigma) * slope
        yield x
