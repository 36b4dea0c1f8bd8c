"""How much noise at which time: σ(t), t(σ), and the list of σ's that a sampler walks down.

A training picture x₀ is noised as x_vp = √ᾱ·x₀ + √(1−ᾱ)·ε (DDPM Eq. 4). The whole library divides that by √ᾱ:

    x = x₀ + σ·ε,        σ = √((1−ᾱ)/ᾱ),        √ᾱ = 1/√(1+σ²),        λ = log(√ᾱ/√(1−ᾱ)) = −log σ

so "variance preserving" is a unit of x, not another method. σ runs from .0292 (t = 0) to 14.61 (t = 999) in
Stable Diffusion. Between whole t, σ(t) is linear, and t(σ) is its exact inverse.

Everything here is float64 on the host: a scheduler's coefficients are Python floats.
"""
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np

# What stands for ᾱ = 0 (a terminal SNR of zero), where σ would be ∞: float16's smallest number above zero, as
# in diffusers, which makes σ = 4096; or half of the ᾱ before, if that is smaller.
_ALPHA_BAR_FOR_ZERO = 2.0**-24


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The β's of training (DDPM Eq. 2), as one float64 array (T,), and what follows from them."""
    betas: np.ndarray = field(repr=False)
    table: np.ndarray = field(init=False, repr=False)     # σ at t = 0, 1, … T−1

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)      # a copy, so that freezing it surprises nobody
        if (betas.ndim != 1 or len(betas) < 2
                or not np.all((betas > 0) & (betas <= 1)) or np.any(betas[:-1] == 1)):
            raise ValueError("NoiseSchedule: betas must be a list of at least two numbers, above 0 and below "
                             "1; only the last may be 1.")
        alpha_bar = np.cumprod(1 - betas)
        if betas[-1] == 1:
            alpha_bar[-1] = min(_ALPHA_BAR_FOR_ZERO, alpha_bar[-2] / 2)
        table = np.sqrt(1 / alpha_bar - 1)
        if not np.all(np.diff(table) > 0):
            raise ValueError("NoiseSchedule: these betas do not make σ grow from step to step; "
                             "they cannot be inverted.")
        betas.flags.writeable = table.flags.writeable = False
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "table", table)

    @classmethod
    def linear(cls, start: float = 0.0001, end: float = 0.02, steps: int = 1000) -> "NoiseSchedule":
        """DDPM's own schedule (Ho et al. 2020, section 4)."""
        return cls(np.linspace(start, end, steps))

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> "NoiseSchedule":
        """Linear in √β; the defaults are those of every Stable Diffusion."""
        return cls(np.linspace(start**0.5, end**0.5, steps) ** 2)

    @classmethod
    def cosine(cls, steps: int = 1000) -> "NoiseSchedule":
        """Nichol & Dhariwal 2021, Eq. 17, with β at most .999; Hugging Face's `squaredcos_cap_v2`."""
        alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return cls(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """Reads the β's from a `scheduler_config.json` of diffusers, of any scheduler class.

        A missing field has the default of diffusers' class (of most: linear, .0001 to .02), which is not
        Stable Diffusion's value: its files always say scaled_linear, .00085 to .012.

        Raises:
            ValueError: a kind of schedule that is not implemented; names the field.
        """
        if str(config.get("_class_name", "")).startswith(("EDM", "FlowMatch")):
            raise ValueError(f"scheduler_config.json is of {config['_class_name']}: its model was trained on "
                             f"other noise levels than a list of β's gives, and ldm has no such models.")
        get = {key: value for key, value in config.items() if value is not None}.get
        classes = {"HeunDiscreteScheduler":           (0.00085, 0.012, "linear"),
                   "KDPM2DiscreteScheduler":          (0.00085, 0.012, "linear"),
                   "KDPM2AncestralDiscreteScheduler": (0.00085, 0.012, "linear"),
                   "DPMSolverSDEScheduler":           (0.00085, 0.012, "linear"),
                   "LCMScheduler":                    (0.00085, 0.012, "scaled_linear"),
                   "TCDScheduler":                    (0.00085, 0.012, "scaled_linear")}
        start, end, kind = classes.get(str(get("_class_name")), (0.0001, 0.02, "linear"))
        start, end  = get("beta_start", start), get("beta_end", end)
        steps, kind = get("num_train_timesteps", 1000), get("beta_schedule", kind)
        if get("trained_betas") is not None:
            schedule = cls(np.asarray(get("trained_betas")))
        elif kind == "linear":
            schedule = cls.linear(start, end, steps)
        elif kind == "scaled_linear":
            schedule = cls.scaled_linear(start, end, steps)
        elif kind == "squaredcos_cap_v2":
            schedule = cls.cosine(steps)
        else:
            raise ValueError(f"scheduler_config.json has beta_schedule = {kind!r}; implemented are 'linear', "
                             f"'scaled_linear' and 'squaredcos_cap_v2', or the numbers themselves as "
                             f"'trained_betas'.")
        return schedule.zero_terminal_snr() if get("rescale_betas_zero_snr", False) else schedule

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """Shifts and scales √ᾱ so that the last step is pure noise.

        Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Algorithm 1. Only for
        models trained on it to predict v or x₀: in pure noise, ε says nothing about x₀.
        """
        if self.betas[-1] == 1:                                                          # it is already
            return self
        root      = np.sqrt(np.cumprod(1 - self.betas))
        root      = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alpha_bar = root**2
        return NoiseSchedule(1 - np.append(alpha_bar[0], alpha_bar[1:] / alpha_bar[:-1]))

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def sigma_min(self) -> float:
        return float(self.table[0])

    @property
    def sigma_max(self) -> float:
        return float(self.table[-1])

    def sigma(self, t: float) -> float:
        """σ at the time t in [0, T−1], linear between whole t; outside, the value at the nearer end."""
        return float(np.interp(t, np.arange(len(self)), self.table))

    def t(self, sigma: float) -> float:
        """The time t in [0, T−1] at which the noise is σ: the inverse of `sigma`. Outside, the nearer end."""
        return float(np.interp(sigma, self.table, np.arange(len(self))))

    def midpoint(self, a: float, b: float) -> float:
        """The σ whose time lies halfway between the times of the σ's a and b."""
        return self.sigma((self.t(a) + self.t(b)) / 2)

    def timesteps(self, steps: int, spacing: str = "trailing", *, offset: int = 0, whole: bool = True,
                  drop_last: bool = False, grid: int | None = None) -> np.ndarray:
        """`steps` times, falling, for the spacings of Lin et al. 2023, Table 2.

        Args:
            steps:     how many; 1 … T, or any number for "linspace" when `whole` is false.
            spacing:   "leading" (0, r, 2r, … with r = ⌊T/steps⌋; leaves out the noisiest times), "linspace"
                       (both ends) or "trailing" (starts at T−1; the only one that makes sense for very few
                       steps). The table's times run from 1 to T, ours from 0 to T−1.
            offset:    is added to "leading" times (Stable Diffusion: 1) as far as they stay within the table.
            whole:     round to whole times, unless that would repeat one; "trailing" times always are whole.
            drop_last: divide into one step more and leave its last time out, as DPM-Solver's authors do;
                       "leading" and "linspace" only.
            grid:      "trailing" only: take them from the so many times k − 1, 2k − 1, … T − 1 that a latent
                       consistency model was taught.

        Raises:
            ValueError: an unknown spacing, or a number of steps that it cannot give.
        """
        steps = _whole(steps)
        if steps > len(self) and (whole or spacing != "linspace"):
            raise ValueError(f"steps is {steps}, but the model knows {len(self)} times: "
                             f"use at most that many, or a spacing in σ, such as 'karras'.")
        total, count = len(self), steps + drop_last
        if spacing == "leading":
            t = np.arange(count)[::-1] * float(max(total // count, 1))
            t = t + min(offset, total - 1 - t[0])
        elif spacing == "linspace":
            t = np.linspace(0, total - 1, count)[::-1]
        elif spacing == "trailing" and grid is not None:
            if not steps <= grid <= total:
                raise ValueError(f"steps is {steps}, but the model was taught {grid} of {total} times "
                                 f"(original_inference_steps): use at most that many; 4 are usual.")
            return (grid - np.arange(steps) * grid // steps) * float(total // grid) - 1
        elif spacing == "trailing":
            return np.round(total - np.arange(steps) * (total / steps)) - 1
        else:
            raise ValueError(f"spacing is {spacing!r}; there are 'leading', 'linspace', 'trailing', "
                             f"{', '.join(map(repr, RAMPS))}.")
        t = t[:steps]
        rounded = np.round(t)
        return rounded if whole and len(set(rounded)) == steps else t

    def sigmas(self, steps: int, spacing: str = "trailing", *, last: str = "zero", offset: int = 0,
               whole: bool = True, drop_last: bool = False, grid: int | None = None) -> list[float]:
        """steps + 1 falling σ's: one for each step, and the one where the last step ends. (With
        last="sigma_min", "linspace" and "leading" may be at σ(0) already: then their last step has length
        zero, as in diffusers.)

        Args:
            spacing: as for `timesteps`, whose other arguments go there; or a ramp in σ over the whole trained
                     range: "karras", "exponential", "polyexponential", "beta".
            last:    "zero", or "sigma_min" for σ(0).

        Raises:
            ValueError: an unknown spacing or last, or a number of steps that the spacing cannot give.
        """
        if last not in ("zero", "sigma_min"):
            raise ValueError(f"last is {last!r}; there are 'zero' and 'sigma_min'.")
        if spacing in RAMPS:
            steps = _whole(steps)
            # A ramp that ends at σ_min is already there: one point more, not a last step of length zero.
            count  = steps + (last == "sigma_min")
            sigmas = [float(s) for s in RAMPS[spacing](count, self.sigma_min, self.sigma_max)]
            return sigmas + [0.0] * (last == "zero")
        t = self.timesteps(steps, spacing, offset=offset, whole=whole, drop_last=drop_last, grid=grid)
        return [self.sigma(x) for x in t] + [0.0 if last == "zero" else self.sigma_min]


def _whole(steps: int) -> int:
    """A number of steps, of any type of whole numbers. ValueError: it is none, or less than 1."""
    if not hasattr(steps, "__index__") or steps < 1:
        raise ValueError(f"steps is {steps!r}; it must be a whole number, at least 1.")
    return operator.index(steps)


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Equal steps in σ^(1/ρ), from σ_max to σ_min: EDM (Karras et al. 2022), Eq. 5."""
    ramp = np.linspace(0, 1, steps)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def polyexponential(steps: int, sigma_min: float, sigma_max: float, rho: float = 2.0) -> np.ndarray:
    """A polynomial of degree ρ in log σ, as in k-diffusion: ρ > 1 spends more of the steps at small σ."""
    ramp = np.linspace(1, 0, steps) ** rho
    return np.exp(ramp * (np.log(sigma_max) - np.log(sigma_min)) + np.log(sigma_min))


def exponential(steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Equal steps in log σ, that is in λ."""
    return polyexponential(steps, sigma_min, sigma_max, rho=1.0)


def beta(steps: int, sigma_min: float, sigma_max: float, alpha: float = 0.6) -> np.ndarray:
    """Quantiles of the symmetric Beta(α, α) distribution, dense at both ends.

    Lee et al. 2024, "Beta Sampling is All You Need", place the times t like that. Here it is the σ's, as in
    diffusers, so that more of them are large.

    The distribution function below ½ is, with w = v^(1/α), an integral of a smooth function of v, which
    Gauss–Legendre quadrature gets to 1e-9 for α ≤ 1; bisection inverts it.
    """
    node, weight = np.polynomial.legendre.leggauss(64)

    def mass(u: np.ndarray) -> np.ndarray:                           # ∫₀ᵘ w^(α−1) (1−w)^(α−1) dw for u ≤ ½
        v = u[:, None] ** alpha * (node + 1) / 2
        return u**alpha / (2 * alpha) * ((1 - v ** (1 / alpha)) ** (alpha - 1) @ weight)

    p        = np.linspace(1, 0, steps)
    tail     = np.minimum(p, 1 - p)
    target   = tail * 2 * mass(np.array([0.5]))
    lo, hi   = np.zeros(steps), np.full(steps, 0.5)
    for _ in range(60):
        middle = (lo + hi) / 2
        below  = mass(middle) < target
        lo, hi = np.where(below, middle, lo), np.where(below, hi, middle)
    quantile = np.where(p > 0.5, 1 - hi, lo)
    quantile = np.where(tail == 0, p, quantile)
    return sigma_min + quantile * (sigma_max - sigma_min)


# Spacings in σ: (steps, σ_min, σ_max) → σ's from σ_max down to σ_min.
RAMPS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "karras": karras, "exponential": exponential, "polyexponential": polyexponential, "beta": beta,
}


def check_sigmas(sigmas: Sequence[float]) -> list[float]:
    """A user's own list: at least two finite σ's ≥ 0, falling. Raises ValueError otherwise."""
    out = [float(s) for s in sigmas]
    if len(out) < 2 or out[-1] < 0 or not all(inf > a > b for a, b in pairwise(out)):
        raise ValueError(f"sigmas must be at least two falling numbers, the last of them ≥ 0; got {out}.")
    return out
