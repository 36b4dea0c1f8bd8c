"""Linear multistep methods (Adams–Bashforth) on ε: one call of the network a step, earlier ones remembered.

K-LMS and PLMS are the same method,

    x' = x + (σ' − σ)·Σ_j w_j·ε_j        over the last four ε's, the newest first,

with different weights w. K-LMS integrates the polynomial through (σ_j, ε_j) exactly. PLMS uses the textbook
weights for equal steps, though the steps in σ are not equal, which makes it of second order. PNDM is PLMS
after a Runge–Kutta start.

In both, the transfer φ of the PNDM paper (Liu et al. 2022, from its Eq. 9) has become `x + (σ' − σ)·ε`: its
ᾱ algebra is that step, written in the units of x_vp.

All count the history that they have, not the index of the step, so a run may start anywhere in a schedule.
"""
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..denoiser import Denoise

# Adams–Bashforth weights for equal steps, orders 1 to 4, newest ε first (the last row is PNDM's).
ADAMS_BASHFORTH = (
    (1.,),
    (3/2,    -1/2),
    (23/12, -16/12,  5/12),
    (55/24, -59/24, 37/24, -9/24),
)


def lms(denoise: Denoise, x: Tensor, sigmas: Sequence[float], order: int = 4,
        skipped: int = 0) -> Iterator[Tensor]:
    """K-LMS (Crowson 2022, k-diffusion): Adams–Bashforth for unequal steps; order 1 to 4.

    The first step is an Euler step. At σ_max that is accurate, since ε hardly changes there. Where steps of a
    longer run were skipped it is not, and its error would outweigh all others; there the first step is one of
    Heun's method, with a call more.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"lms has orders 1 to 4; got {order}.")
    history: list[tuple[float, Tensor]] = []                                    # (σ_j, ε_j), the newest first
    for sigma, following in pairwise(sigmas):
        heun    = skipped and order > 1 and not history and following > 0
        history = [(sigma, (x - denoise(x, sigma)) / sigma), *history[:order - 1]]
        weights = lagrange_integrals([s for s, _ in history], sigma, following)
        ahead   = x + sum(weight * eps for weight, (_, eps) in zip(weights, history, strict=True))
        if heun:
            slope = (history[0][1] + (ahead - denoise(ahead, following)) / following) / 2
            ahead = x + (following - sigma) * slope
        x = ahead
        yield x


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """∫ ℓ_j(σ) dσ from start to end, for each Lagrange basis polynomial ℓ_j on the nodes.

    ℓ_j is one at node j, and zero at the rest.
    """
    integrals = []
    for j, node in enumerate(nodes):
        others   = [other for i, other in enumerate(nodes) if i != j]
        basis    = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        integral = (basis / basis(node)).integ(lbnd=start)
        integrals.append(float(integral(end)))
    return integrals


def plms(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """PLMS, pseudo linear multistep, as Stable Diffusion uses it.

    Liu et al. 2022, Algorithm 2, without the Runge–Kutta start. The first step is an Euler step to σ' and
    back, averaging both ε's (Heun's method), so N steps take N + 1 calls, but a single one takes one.
    """
    if len(sigmas) < 2:
        return
    first = slope = (x - denoise(x, sigmas[0])) / sigmas[0]
    step  = sigmas[1] - sigmas[0]
    if len(sigmas) > 2:
        ahead = x + step * first
        slope = (first + (ahead - denoise(ahead, sigmas[1])) / sigmas[1]) / 2
    x = x + step * slope
    yield x
    yield from _adams_bashforth(denoise, x, sigmas[1:], [first])


def pndm(denoise: Denoise, x: Tensor, sigmas: Sequence[float],
         midpoint: Callable[[float, float], float] = lambda a, b: (a + b) / 2) -> Iterator[Tensor]:
    """PNDM (F-PNDM): Liu et al. 2022, Algorithm 2.

    Three pseudo Runge–Kutta steps of four calls each, then PLMS.

    midpoint: (σ, σ') → the σ in the middle of a Runge–Kutta step. The paper takes the middle in time t, which
        is what `NoiseSchedule.midpoint` gives; the default is the middle in σ.
    """
    history: list[Tensor] = []
    for sigma, following in list(pairwise(sigmas))[:3]:
        middle = midpoint(sigma, following)
        half, full = middle - sigma, following - sigma
        e1 = (x - denoise(x, sigma)) / sigma
        x1 = x + half * e1
        e2 = (x1 - denoise(x1, middle)) / middle
        x2 = x + half * e2
        e3 = (x2 - denoise(x2, middle)) / middle
        x3 = x + full * e3
        # ε at σ = 0 is the limit 0/0 of this expression; an end there takes the slope of the step before it.
        e4 = (x3 - denoise(x3, following)) / following if following > 0 else e3
        x  = x + full * (e1 + 2 * e2 + 2 * e3 + e4) / 6
        history = [e1, *history]
        yield x
    yield from _adams_bashforth(denoise, x, sigmas[3:], history)


def _adams_bashforth(denoise: Denoise, x: Tensor, sigmas: Sequence[float],
                     history: list[Tensor]) -> Iterator[Tensor]:
    for sigma, following in pairwise(sigmas):
        history = [(x - denoise(x, sigma)) / sigma, *history[:3]]
        weights = ADAMS_BASHFORTH[len(history) - 1]
        eps     = sum(weight * e for weight, e in zip(weights, history, strict=True))
        x       = x + (following - sigma) * eps
        yield x
