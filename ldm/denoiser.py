"""From a network to a denoiser: the only place for c_in, for t(σ), for ε / v / x₀, and for casts.

A network F was trained on variance-preserving inputs x_vp = x/√(1+σ²) at times t. A sampler wants one
function: given x = x₀ + σ·ε, what is x₀? That is D(x; σ) in EDM (Karras et al. 2022, Eq. 7, and for
prediction "epsilon" the column "VP" of Table 1).

    prediction        the network's output F                      D(x; σ)
    "epsilon"         ε                                           x − σ·F
    "v_prediction"    v = √ᾱ·ε − √(1−ᾱ)·x₀  (Salimans & Ho 2022)  x/(1+σ²) − σ/√(1+σ²)·F
    "sample"          x₀                                          F
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .noise_schedule import NoiseSchedule

Denoise = Callable[[Tensor, float], Tensor]     # what a scheduler sees: (x, σ) → x̂₀, conditioning bound

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Conditioning:
    """What a network is told besides x and σ; N pictures.

    context: (N, S, D) states of the text encoder.
    vector:  (N, V) for SDXL, else None.
    concat:  (N, C, h, w) channels joined to the scaled x, the mask and the masked latents of an inpainting
             model, else None.
    guidance: (N,) guidance scales, for a network that was taught to guide itself (LCM), else None.
    """
    context: Tensor
    vector: Tensor | None = None
    concat: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    @staticmethod
    def cat(parts: "Sequence[Conditioning]") -> "Conditioning":
        """Joins conditionings along the batch, so that one call of the network serves all of them."""
        def join(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if all(value is None for value in values):
                return None
            if any(value is None for value in values):
                raise ValueError(f"Some conditionings have `{name}` and some have not; "
                                 f"they cannot share a batch.")
            return torch.cat(values)
        return Conditioning(*(join(field.name) for field in fields(Conditioning)))


def check_prediction(prediction: str) -> None:
    """ValueError: it is none of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}; there are {', '.join(map(repr, PREDICTIONS))}.")


@dataclass(frozen=True)
class Denoiser:
    """D(x; σ): wraps a network. Call it with x (N, 4, h, w), σ and a Conditioning of N; returns x̂₀ like x.

    network:    F(x, t, context, vector) → tensor. Runs in the dtype of its first parameter, or else of the
                context, whatever the state's is. Where the conditioning has a guidance scale, it is called
                with that as well: guidance=scale.
    schedule:   gives t(σ).
    prediction: "epsilon", "v_prediction" or "sample": what F was trained to tell.
    whole_t:    round t(σ) to the whole times of training, as some of diffusers' schedulers do; it matters
                for σ's whose t falls between: spacings in σ, σ's of one's own, and the midpoints of PNDM.
    """
    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    prediction: str = "epsilon"
    whole_t: bool = False

    def __post_init__(self) -> None:
        check_prediction(self.prediction)

    def __call__(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        return self.to_x0(self.output(x, sigma, conditioning), x, sigma)

    def output(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The network's own output F at x, in the dtype of x."""
        time  = self.schedule.t(sigma)
        time  = round(time) if self.whole_t else time
        t     = torch.full((), time, dtype=torch.float32, device=x.device)          # no copy to wait for
        input = x / (1 + sigma**2) ** 0.5                                           # c_in·x = x_vp
        if conditioning.concat is not None:
            input = torch.cat([input, conditioning.concat.to(x.dtype)], dim=1)
        more  = {} if conditioning.guidance is None else {"guidance": conditioning.guidance}
        context, vector = conditioning.context, conditioning.vector
        weight = next(self.network.parameters(), None) if isinstance(self.network, nn.Module) else None
        dtype  = context.dtype if weight is None else weight.dtype
        vector = None if vector is None else vector.to(dtype)
        return self.network(input.to(dtype), t, context.to(dtype), vector, **more).to(x.dtype)

    def to_x0(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The table above: what F says about x₀."""
        if self.prediction == "epsilon":
            return x - sigma * output
        if self.prediction == "v_prediction":
            return x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * output
        return output
