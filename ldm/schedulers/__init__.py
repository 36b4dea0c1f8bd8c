"""Schedulers: how to walk down the σ's.

A scheduler is a generator function

    scheduler(denoise, x, sigmas, **options)  →  yields x after each step

where `denoise(x, σ)` returns x̂₀, x is the state x₀ + σ·ε at sigmas[0], and sigmas falls. Its history lives
in local variables; the caller owns the loop, may stop at any step, look at x, or start in the middle with
sigmas[k:]. One that needs random numbers has a parameter `noise`: i → standard normal like x, for its step i.
One that does something else for a start in the middle has a parameter `skipped`, for which k is to be given.
"""
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..noise_schedule import NoiseSchedule
from .dpm import dpm_solver, dpm_solver_pp, dpm_solver_pp_sde
from .euler import euler, euler_ancestral, lcm
from .heun import heun
from .multistep import lms, plms, pndm

__all__ = ["SCHEDULERS", "Row", "default_name", "dpm_solver", "dpm_solver_pp", "dpm_solver_pp_sde", "euler",
           "euler_ancestral", "find", "heun", "lcm", "lms", "plms", "pndm"]

Scheduler = Callable[..., Iterator[Tensor]]


@dataclass(frozen=True)
class Row:
    """What a *name* stands for: a method, and the habits that diffusers' class has around it.

    The habits choose the σ's and the scale of the start; given those, the function alone is the method.
    """
    function: Scheduler
    diffusers: str = ""               # the class that gives the same picture, and its arguments
    spacing: str   = "linspace"       # where the model's file has no timestep_spacing
    last: str      = "zero"           # where the last step ends, if the file does not say…
    last_field: str = ""              # …in this field: final_sigmas_type, set_alpha_to_one, or none
    ramps: bool    = False            # heeds the file's use_karras_sigmas and the like
    own_spacing: bool = False         # does not heed the file's timestep_spacing
    grid: int | None = None           # chooses from that many times, or the file's original_inference_steps
    whole: bool    = False            # rounds times to whole ones
    drop_last: bool = False           # divides the times into one step more and leaves the last out
    start_vp: bool = True             # starts at x_vp = noise; else at σ₀·noise, unless spacing is "leading"
    options: Callable[[NoiseSchedule], Mapping[str, Any]] = lambda schedule: {}

    @property
    def stochastic(self) -> bool:
        """Whether the function takes `noise`."""
        return self.takes("noise")

    def takes(self, name: str) -> bool:
        """Whether the function has a parameter of that name, which `functools.partial` has not bound."""
        return (name in inspect.signature(self.function).parameters
                and name not in getattr(self.function, "keywords", {}))

    def sigmas(self, schedule: NoiseSchedule, steps: int, *, spacing: str | None = None,
               config: Mapping[str, Any] | None = None) -> list[float]:
        """The σ's of a run: by `spacing`, else by the model's scheduler_config.json, else by the row."""
        config = config or {}
        if spacing is None and self.ramps:
            ramps   = ("karras", "exponential", "beta")
            spacing = next((ramp for ramp in ramps if config.get(f"use_{ramp}_sigmas")), None)
        last = self.last
        if self.last_field == "set_alpha_to_one" and config.get("set_alpha_to_one") is not None:
            last = "zero" if config["set_alpha_to_one"] else "sigma_min"
        elif self.last_field:
            last = config.get(self.last_field) or last
        grid = None
        if self.grid is not None and spacing is None:
            grid = config.get("original_inference_steps") or self.grid
        return schedule.sigmas(steps, spacing or self._spacing(config), last=last,
                               offset=config.get("steps_offset") or 0,
                               whole=self.whole, drop_last=self.drop_last, grid=grid)

    def start_scale(self, sigma: float, *, spacing: str | None = None,
                    config: Mapping[str, Any] | None = None) -> float:
        """The factor of the standard normal noise from which a run from `sigma` starts."""
        config = config or {}
        spacing = spacing if spacing in ("leading", "linspace", "trailing") else self._spacing(config)
        return sigma if not self.start_vp and spacing != "leading" else (1 + sigma**2) ** 0.5

    def _spacing(self, config: Mapping[str, Any]) -> str:
        return self.spacing if self.own_spacing else config.get("timestep_spacing") or self.spacing


def _dpm(function: Scheduler, order: int, diffusers: str, **habits: Any) -> Row:
    return Row(function, diffusers, whole=True, drop_last=True, ramps=True,
               options=lambda _: {"order": order}, **habits)


SCHEDULERS: dict[str, Row] = {
    "ddim":     Row(euler_ancestral, "DDIMScheduler", "leading", last_field="set_alpha_to_one", whole=True,
                    options=lambda _: {"eta": 0.0}),
    "ddpm":     Row(euler_ancestral, "DDPMScheduler", "leading", whole=True),
    "pndm":     Row(plms, "PNDMScheduler(skip_prk_steps=True)",
                    "leading", "sigma_min", "set_alpha_to_one", whole=True),
    "pndm_prk": Row(pndm, "PNDMScheduler(skip_prk_steps=False)",
                    "leading", "sigma_min", "set_alpha_to_one", whole=True,
                    options=lambda schedule: {"midpoint": schedule.midpoint}),
    "euler":    Row(euler, "EulerDiscreteScheduler",
                    last_field="final_sigmas_type", ramps=True, start_vp=False),
    "euler_a":  Row(euler_ancestral, "EulerAncestralDiscreteScheduler", start_vp=False),
    "heun":     Row(heun, "HeunDiscreteScheduler", ramps=True, start_vp=False),
    "lms":      Row(lms, "LMSDiscreteScheduler", ramps=True, start_vp=False),
    "dpm":      _dpm(dpm_solver, 2, "DPMSolverSinglestepScheduler(algorithm_type='dpmsolver', "
                     "solver_order=2, final_sigmas_type='sigma_min')", last="sigma_min", own_spacing=True),
    "dpm_3":    _dpm(dpm_solver, 3, "DPMSolverSinglestepScheduler(algorithm_type='dpmsolver', "
                     "solver_order=3, final_sigmas_type='sigma_min')", last="sigma_min", own_spacing=True),
    "dpmpp_2m": _dpm(dpm_solver_pp, 2, "DPMSolverMultistepScheduler(solver_order=2)",
                     last_field="final_sigmas_type"),
    "dpmpp_3m": _dpm(dpm_solver_pp, 3, "DPMSolverMultistepScheduler(solver_order=3)",
                     last_field="final_sigmas_type"),
    "dpmpp_2m_sde":
                _dpm(dpm_solver_pp_sde, 2, "DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++')",
                     last_field="final_sigmas_type"),
    "lcm":      Row(lcm, "LCMScheduler", "trailing", own_spacing=True, whole=True, grid=50),
}


def find(scheduler: str | Scheduler) -> Row:
    """The row of a name; or, for a function of your own, one that ends at zero.

    Such a row starts at the noisiest time, unless the model's file asks for another spacing.
    """
    if callable(scheduler):
        return Row(scheduler, spacing="trailing")
    if scheduler not in SCHEDULERS:
        raise ValueError(f"There is no scheduler {scheduler!r}; there are {', '.join(SCHEDULERS)}, "
                         f"or any function (denoise, x, sigmas) that yields x after each step. "
                         f"Karras, exponential and beta are spacings: spacing='karras'.")
    return SCHEDULERS[scheduler]


def default_name(config: Mapping[str, Any]) -> str:
    """The row for a scheduler_config.json. Warns and takes "dpmpp_2m" when its class has no row here."""
    kind, order = config.get("_class_name"), config.get("solver_order") or 2
    algorithm   = config.get("algorithm_type") or "dpmsolver++"
    name = {"DDIMScheduler": "ddim",
            "DDPMScheduler": "ddpm",
            "PNDMScheduler": "pndm" if config.get("skip_prk_steps") else "pndm_prk",
            "EulerDiscreteScheduler": "euler",
            "EulerAncestralDiscreteScheduler": "euler_a",
            "HeunDiscreteScheduler": "heun",
            "LMSDiscreteScheduler": "lms",
            "LCMScheduler": "lcm",
            "DPMSolverSinglestepScheduler": {("dpmsolver", 2): "dpm",
                                             ("dpmsolver", 3): "dpm_3"}.get((algorithm, order)),
            "DPMSolverMultistepScheduler":  {("dpmsolver++", 2): "dpmpp_2m",
                                             ("dpmsolver++", 3): "dpmpp_3m",
                                             ("sde-dpmsolver++", 2): "dpmpp_2m_sde"}.get((algorithm, order)),
            }.get(str(kind))
    if name is None:
        warnings.warn(f"The model's scheduler is {kind} (algorithm {algorithm}, order {order}), "
                      f"which ldm does not have; taking 'dpmpp_2m'.", stacklevel=2)
    if kind in ("DDIMScheduler", "DDPMScheduler"):                          # whose default it is
        config = {"clip_sample": True, **config}
    heeded = {**USUAL, **USUAL_OF.get(str(kind), {})}
    if config.get("final_sigmas_type") != "sigma_min":          # the last step, to zero, is Euler's anyway
        del heeded["euler_at_final"]
        if kind == "DPMSolverMultistepScheduler" and order < 3:
            del heeded["lower_order_final"]
    for field, usual in heeded.items():
        if config.get(field) not in (None, *usual):
            warnings.warn(f"The model's scheduler_config.json has {field} = {config[field]!r}, which ldm "
                          f"does not heed: the pictures will differ from those of diffusers.", stacklevel=2)
    return name or "dpmpp_2m"


# Fields of a scheduler_config.json that change a method in diffusers, and the values that ldm has built in.
USUAL: Mapping[str, tuple[Any, ...]] = {
    "solver_type": ("midpoint",), "euler_at_final": (False,), "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,), "interpolation_type": ("linear",), "thresholding": (False,),
    "lambda_min_clipped": (-math.inf, "-inf"), "sigma_min": (), "sigma_max": ()}
# Those that only some classes heed; the files of others carry them along.
USUAL_OF: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "DDIMScheduler": {"clip_sample": (False,)},
    "DDPMScheduler": {"clip_sample": (False,), "variance_type": ("fixed_small", "fixed_small_log")},
    "HeunDiscreteScheduler": {"clip_sample": (False,)},
    "LCMScheduler": {"clip_sample": (False,)},
    "DPMSolverMultistepScheduler": {"lower_order_final": (True,)},
    "DPMSolverSinglestepScheduler": {"lower_order_final": (False,)}}
