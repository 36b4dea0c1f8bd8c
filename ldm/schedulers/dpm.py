"""DPM-Solver and DPM-Solver++: exponential integrators in λ = −log σ.

Written in x = x₀ + σ·ε, both papers' factors α cancel, and with h = λ' − λ the exact solution of one step is

    x' = x − σ'·∫ e^(λ'−λ) ε dλ              (DPM-Solver,   Lu et al. 2022a, Proposition 3.1)
    x' = e^(−h)·x + ∫ e^(λ−λ') D dλ          (DPM-Solver++, Lu et al. 2022b, the same for data prediction)

Expanding ε or D around the start of the step gives the methods; the coefficients are φ-functions, those of
the exponential integrators,

    φ₁(h) = (eʰ − 1)/h        φ₂(h) = (φ₁(h) − 1)/h        φ₃(h) = (φ₂(h) − ½)/h

taken at h for ε and at −h for D. With σ'·(eʰ − 1) = σ − σ' the first order is Euler's method in both. For
the second order both papers take φ₁/2 in the place of φ₂, which is the same to that order.
"""
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ..denoiser import Denoise


def phi(h: float) -> tuple[float, float, float]:
    """φ₁, φ₂, φ₃ at h; by their power series Σ hⁿ/(n+k)! where the closed form would cancel."""
    if abs(h) < 0.1:
        phi1, phi2, phi3 = (sum(h**n / math.factorial(n + k) for n in range(10)) for k in (1, 2, 3))
        return phi1, phi2, phi3
    phi1 = math.expm1(h) / h
    phi2 = (phi1 - 1) / h
    return phi1, phi2, (phi2 - 0.5) / h


def dpm_solver(denoise: Denoise, x: Tensor, sigmas: Sequence[float], order: int = 2,
               skipped: int = 0) -> Iterator[Tensor]:
    """DPM-Solver, single step, order 1 to 3 (Lu et al. 2022a, Algorithms 1 and 2 with general r).

    One call of the network for each σ. A step of order k spans k intervals of `sigmas`; the σ's inside are
    its intermediate points; the third order needs the last of them near 2/3 of the step in λ, as all smooth
    spacings have it. As many full steps as fit, then one of a lower order for the rest, much as in the
    paper's "DPM-Solver-fast". A last interval to σ = 0, where λ = ∞, is a step of its own, of first order.

    skipped: how many intervals of a longer run lie before `sigmas`. The steps begin and end where they do in
        that run; a start inside of one makes a step of a lower order for the rest of it.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"dpm_solver has orders 1 to 3; got {order}.")
    start = 0
    while start < len(sigmas) - 1:
        finite = len([s for s in sigmas[start + 1:] if s > 0])      # intervals that do not end at zero
        left   = order - (start + skipped) % order                  # … of this step
        nodes  = sigmas[start:start + 1 + max(1, min(left, finite))]
        start += len(nodes) - 1
        origin, epsilons = x, []
        for k in range(1, len(nodes)):
            epsilons.append((x - denoise(x, nodes[k - 1])) / nodes[k - 1])
            x = _noise_step(origin, nodes[:k], epsilons, nodes[k])
            yield x


def _noise_step(x: Tensor, sigmas: Sequence[float], epsilons: Sequence[Tensor], target: float) -> Tensor:
    """From σ₀ = sigmas[0], where x is, to the target, with ε known at one to three σ's.

    DPM-Solver-1, -2 and -3 of Lu et al. 2022a, the latter two with general r. One thing is not the paper's
    but diffusers': inside a step of order 3, the second point is reached by DPM-Solver-2. The paper has φ₂
    there too, a difference in terms of third order.
    """
    sigma, e0 = sigmas[0], epsilons[0]
    first = x + (target - sigma) * e0
    if len(epsilons) == 1:
        return first
    h = math.log(sigma / target)
    r = math.log(sigma / sigmas[-1]) / h                            # where in the step the newest ε was taken
    difference = (epsilons[-1] - e0) / r
    if len(epsilons) == 2:
        return first + (target - sigma) / 2 * difference
    return first - target * h * phi(h)[1] * difference


def dpm_solver_pp(denoise: Denoise, x: Tensor, sigmas: Sequence[float], order: int = 2,
                  skipped: int = 0) -> Iterator[Tensor]:
    """DPM-Solver++, multistep, order 1 to 3 (Lu et al. 2022b, Algorithm 2 is order 2, "2M"): one call a step.

    The order grows with the history, and falls again at the end: a last step to σ = 0, where λ = ∞, is of
    first order (x' = D); below 15 steps the last two are of orders 2 and 1, for stability, as the authors
    advise and diffusers does.

    skipped: how many steps of a longer run lie before `sigmas`; they count among these 15.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"dpm_solver_pp has orders 1 to 3; got {order}.")
    history: list[tuple[float, Tensor]] = []                              # (λ, D), the newest first
    for (sigma, following), highest in zip(pairwise(sigmas), _orders(sigmas, order, skipped), strict=True):
        history = [(-math.log(sigma), denoise(x, sigma)), *history[:2]]
        d0 = history[0][1]
        decay = following / sigma                                         # e^(−h)
        available = min(highest, len(history))
        x = decay * x + (1 - decay) * d0
        if available > 1:
            h      = math.log(sigma / following)
            slopes = _slopes(history[:available])
            if available == 2:
                x = x + (1 - decay) / 2 * h * slopes[0]
            else:
                _, phi2, phi3 = phi(-h)
                # The Taylor term is h³·φ₃·D''; the authors' code, and diffusers after it, takes half of it.
                x = x + h**2 * phi2 * slopes[0] + h**3 * phi3 / 2 * slopes[1]
        yield x


def dpm_solver_pp_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Callable[[int], Tensor],
                      order: int = 2, skipped: int = 0) -> Iterator[Tensor]:
    """SDE-DPM-Solver++, multistep, order 1 or 2 ("DPM++ 2M SDE").

    Lu et al. 2022b, where they solve the diffusion SDE instead of the ODE: twice the drift towards D, and
    fresh noise that makes up for it.

    noise: i → standard normal like x, for step i = 0, 1, …
    skipped: as for `dpm_solver_pp`.
    """
    if not 1 <= order <= 2:
        raise ValueError(f"dpm_solver_pp_sde has orders 1 and 2; got {order}.")
    history: list[tuple[float, Tensor]] = []
    steps = zip(pairwise(sigmas), _orders(sigmas, order, skipped), strict=True)
    for i, ((sigma, following), highest) in enumerate(steps):
        history = [(-math.log(sigma), denoise(x, sigma)), *history[:1]]
        decay   = (following / sigma) ** 2                                # e^(−2h)
        d       = history[0][1]
        if min(highest, len(history)) == 2:
            d = d + math.log(sigma / following) / 2 * _slopes(history)[0]
        x = decay * x + (1 - decay) * d + following * (1 - decay) ** 0.5 * noise(i)
        yield x


def _orders(sigmas: Sequence[float], order: int, skipped: int) -> list[int]:
    """The highest order allowed in each step; see `dpm_solver_pp`."""
    steps  = len(sigmas) - 1
    few    = steps + skipped < 15
    orders = [order] * steps
    if steps > 0 and (sigmas[-1] == 0 or few):
        orders[-1] = 1
    if few and steps > 1:
        orders[-2] = min(order, 2)
    return orders


def _slopes(history: Sequence[tuple[float, Tensor]]) -> list[Tensor]:
    """First and second derivative of D along λ: divided differences of two or three values, newest first."""
    (l0, d0), (l1, d1) = history[:2]
    first = (d0 - d1) / (l0 - l1)
    if len(history) == 2:
        return [first]
    l2, d2 = history[2]
    second = (first - (d1 - d2) / (l1 - l2)) / (l0 - l2)                  # half the second derivative
    return [first + (l0 - l1) * second, 2 * second]
