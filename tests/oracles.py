"""The judges: code that we did not write (diffusers), and problems whose exact answer is known.

Shared by the tests and by scripts/parity.py. Differences are relative, see `relative`.
"""
import ast
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn

from ldm import Conditioning, Denoiser, NoiseSchedule
from ldm.models import VAE, TinyVAE, TinyVAEConfig, UNet, UNetConfig, VAEConfig
from ldm.models.layers import timestep_embedding
from ldm.schedulers import SCHEDULERS, Row

diffusers.logging.set_verbosity_error()
logging.getLogger("diffusers").setLevel(logging.ERROR)


def relative(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max(1, max |b|)."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


# ── Networks ────────────────────────────────────────────────────────────────────────────────────────────────

# The published configurations, as the files have them, nulls included.
_SD1 = json.loads("""{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
  "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false,
  "cross_attention_dim": 768,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
  "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
  "out_channels": 4, "sample_size": 64,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
}""")
_XL = json.loads("""{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
  "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
  "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": false,
  "class_embed_type": null, "class_embeddings_concat": false, "conv_in_kernel": 3, "conv_out_kernel": 3,
  "cross_attention_dim": 2048, "cross_attention_norm": null,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "downsample_padding": 1, "dual_cross_attention": false, "encoder_hid_dim": null,
  "encoder_hid_dim_type": null, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
  "layers_per_block": 2, "mid_block_only_cross_attention": null, "mid_block_scale_factor": 1,
  "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
  "num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false, "out_channels": 4,
  "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0,
  "resnet_skip_time_act": false, "resnet_time_scale_shift": "default", "sample_size": 128,
  "time_cond_proj_dim": null, "time_embedding_act_fn": null, "time_embedding_dim": null,
  "time_embedding_type": "positional", "timestep_post_act": null,
  "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": null,
  "use_linear_projection": true
}""")
_SD2 = {**_SD1, "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None,
        "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
        "use_linear_projection": True}
_REFINER = {**_XL, "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560,
            "transformer_layers_per_block": 4,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
            "up_block_types":   ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]}
_SD1_INPAINT = {**_SD1, "in_channels": 9, "sample_size": 32}

_SD1_LCM     = {**_SD1, "time_cond_proj_dim": 256}

UNETS = {"SD 1.5": _SD1, "SD 1.5 inpaint": _SD1_INPAINT, "SD 1.5 LCM": _SD1_LCM, "SD 2.1": _SD2,
         "SDXL base": _XL, "SDXL refiner": _REFINER}

SD_VAE = json.loads("""{
  "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": [
    "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
  "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
  "sample_size": 512,
  "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
}""")
SDXL_VAE = {**SD_VAE, "_diffusers_version": "0.20.0.dev0", "force_upcast": True,
            "latents_mean": None, "latents_std": None, "sample_size": 1024, "scaling_factor": 0.13025}

# The same architectures, small enough to compute with.
_POOLED  = 20         # width of SDXL's pooled text
_SMALL_1 = {"block_out_channels": [16, 32, 32, 32], "attention_head_dim": 4, "norm_num_groups": 8,
            "cross_attention_dim": 24}
TINY_UNETS = {
    "SD 1.5":         {**UNETS["SD 1.5"], **_SMALL_1},
    "SD 1.5 inpaint": {**UNETS["SD 1.5 inpaint"], **_SMALL_1},
    "SD 1.5 LCM":     {**UNETS["SD 1.5 LCM"], **_SMALL_1, "time_cond_proj_dim": 12},
    "SD 2.1":         {**UNETS["SD 2.1"], **_SMALL_1, "block_out_channels": [16, 32, 64, 64],
                       "attention_head_dim": [2, 4, 8, 8]},
    "SDXL base":      {**UNETS["SDXL base"], **_SMALL_1, "block_out_channels": [16, 32, 64],
                       "attention_head_dim": [1, 2, 4], "transformer_layers_per_block": [1, 2, 3],
                       "addition_time_embed_dim": 8,
                       "projection_class_embeddings_input_dim": _POOLED + 6 * 8},
    "SDXL refiner":   {**UNETS["SDXL refiner"], **_SMALL_1, "block_out_channels": [16, 32, 48, 48],
                       "attention_head_dim": [1, 2, 3, 3], "transformer_layers_per_block": 2,
                       "addition_time_embed_dim": 8,
                       "projection_class_embeddings_input_dim": _POOLED + 5 * 8},
}
_SMALL_VAE = {"block_out_channels": [8, 16, 16, 24], "norm_num_groups": 4}
TINY_VAES = {
    "SD 1.5":     {**SD_VAE, **_SMALL_VAE},
    "SDXL":       {**SDXL_VAE, **_SMALL_VAE},
    "16 channels, no 1×1 convolutions": {**SD_VAE, **_SMALL_VAE, "latent_channels": 16, "shift_factor": 0.1,
                                         "use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": {**SD_VAE, **_SMALL_VAE, "mid_block_add_attention": False},
}


def same_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """Fills both with the same random weights, norms and biases too: no two tensors can be confused."""
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def unet_pair(config: dict, dtype: torch.dtype) -> tuple[nn.Module, UNet]:
    """(diffusers' U-Net, ours) with the same random weights."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel.from_config(config).to(dtype).eval()
    ours   = UNet(UNetConfig.from_hf(config)).to(dtype).eval()
    same_weights(theirs, ours)
    return theirs, ours


def unet_inputs(config: dict, dtype: torch.dtype, size: tuple[int, int], count: int = 2) -> tuple[dict, dict]:
    """The same random inputs as keyword arguments (for diffusers' U-Net, for ours)."""
    def random(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    x, t    = random(count, config["in_channels"], *size), torch.linspace(1, 801.5, count, dtype=dtype)
    context = random(count, 7, config["cross_attention_dim"])
    theirs  = {"sample": x, "timestep": t, "encoder_hidden_states": context}
    ours    = {"x": x, "t": t, "context": context}
    if width := config.get("addition_time_embed_dim"):
        numbers = (config["projection_class_embeddings_input_dim"] - _POOLED) // width
        pooled  = random(count, _POOLED)
        sizes   = torch.arange(count * numbers, dtype=torch.float32).reshape(count, numbers) * 97
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        features = timestep_embedding(sizes.flatten(), width).reshape(count, -1)
        ours["vector"] = torch.cat([pooled, features.to(dtype)], dim=1)
    if width := config.get("time_cond_proj_dim"):
        ours["guidance"] = torch.linspace(1.25, 8.5, count)
        features = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        theirs["timestep_cond"] = features(None, ours["guidance"] - 1, width).to(dtype)
    return theirs, ours


@torch.no_grad()
def unet_difference(family: str, dtype: torch.dtype, size: tuple[int, int]) -> float:
    """A forward pass of a tiny U-Net against diffusers'."""
    config = TINY_UNETS[family]
    theirs, ours = unet_pair(config, dtype)
    their_inputs, our_inputs = unet_inputs(config, dtype, size)
    return relative(ours(**our_inputs), theirs(**their_inputs).sample)


def vae_pair(config: dict, dtype: torch.dtype) -> tuple[nn.Module, VAE]:
    """(diffusers' autoencoder, ours) with the same random weights."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL.from_config(config).to(dtype).eval()
    ours   = VAE(VAEConfig.from_hf(config)).to(dtype).eval()
    same_weights(theirs, ours)
    return theirs, ours


@torch.no_grad()
def vae_differences(family: str, dtype: torch.dtype, size: tuple[int, int]) -> dict[str, float]:
    """Mean, standard deviation and decoded picture of a tiny autoencoder against diffusers' pipelines."""
    config = TINY_VAES[family]
    theirs, ours = vae_pair(config, dtype)
    factor, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0
    generator = torch.Generator().manual_seed(1)
    shape    = (2, config["latent_channels"], size[0] // 8, size[1] // 8)
    latents  = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    pictures = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1
    mean, std = ours.encode(pictures)
    posterior = theirs.encode(pictures).latent_dist
    return {"mean":   relative(mean, (posterior.mean - shift) * factor),
            "std":    relative(std, posterior.std * factor),
            "decode": relative(ours.decode(latents), theirs.decode(latents / factor + shift).sample)}


TINY_TAESD = {"encoder_block_out_channels": [12] * 4, "decoder_block_out_channels": [12] * 4,
              "latent_channels": 4, "scaling_factor": 1.0}


@torch.no_grad()
def taesd_differences(config: dict, dtype: torch.dtype, size: tuple[int, int]) -> dict[str, float]:
    """Latents and decoded picture of a tiny autoencoder against diffusers' AutoencoderTiny."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny.from_config(config).to(dtype).eval()
    ours   = TinyVAE(TinyVAEConfig.from_hf(config)).to(dtype).eval()
    same_weights(theirs, ours)
    factor   = theirs.config.scaling_factor
    latents  = torch.randn(2, ours.config.latent_channels, size[0] // 8, size[1] // 8).to(dtype) * 3
    pictures = torch.rand(2, 3, *size).to(dtype) * 2 - 1
    mean, std = ours.encode(pictures)
    return {"mean":   relative(mean, theirs.encode(pictures).latents * factor), "std": std.abs().max().item(),
            "decode": relative(ours.decode(latents), theirs.decode(latents / factor).sample)}


# ── Schedulers ──────────────────────────────────────────────────────────────────────────────────────────────

# What every Stable Diffusion's scheduler_config.json says.
SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
      "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "prediction_type": "epsilon"}
SD_SCHEDULE = NoiseSchedule.from_hf(SD)

SPACINGS    = ("leading", "linspace", "trailing")
RAMPS       = ("karras", "exponential", "beta")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

Network = Callable[..., Tensor]


def config_of(spacing: str | None = None, prediction: str = "epsilon", **more: object) -> dict:
    """SD's scheduler_config.json with a spacing or a ramp written into it as diffusers does."""
    says = {f"use_{spacing}_sigmas": True} if spacing in RAMPS else {"timestep_spacing": spacing}
    return {**SD, "prediction_type": prediction, **(says if spacing else {}), **more}


def their_scheduler(row: Row, config: dict, **arguments: object):
    """The scheduler of diffusers that a row of our table names, made from a scheduler_config.json."""
    call = ast.parse(row.diffusers if "(" in row.diffusers else f"{row.diffusers}()", mode="eval").body
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)        # "dpmsolver" is deprecated there
        return getattr(diffusers, call.func.id).from_config({**config, **named, **arguments})


_MIXING = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8**0.5


def curved(x: Tensor, t: Tensor | float, *_: object) -> Tensor:
    """A network on states (N, 8) that is linear in nothing: neither in x nor in the time."""
    return 0.7 * x + 0.6 * torch.tanh(x @ _MIXING + math.sin(float(t) / 300))


def curved_timeless(x: Tensor, *_: object) -> Tensor:
    """The same without the time."""
    return 0.7 * x + 0.6 * torch.tanh(x @ _MIXING)


@dataclass
class Run:
    """The end of a run (x_vp where diffusers' class works in x_vp), and when it called the network."""
    x: Tensor
    times: list[float]


def draws(count: int, shape: tuple[int, ...] = (1, 8)) -> list[Tensor]:
    """Standard normal numbers: the start, and one draw for each step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def run_theirs(row: Row, config: dict, steps: int, network: Network = curved, *,
               x: Tensor | None = None, skip: int = 0, options: dict | None = None,
               **arguments: object) -> Run:
    """A run of diffusers' scheduler as its pipelines do it.

    x:       the state to start from in the scheduler's own units; None: noise.
    skip:    how many steps to leave out at the start, as its image-to-image pipelines do it.
    options: for each call of `step`; arguments: for the constructor.
    """
    scheduler = their_scheduler(row, config, **arguments)
    scheduler.set_timesteps(steps)
    noise = draws(steps + 1)
    fresh = iter(noise[1:])
    x     = noise[0] * scheduler.init_noise_sigma if x is None else x
    if skip and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skip * scheduler.order)
    times  = scheduler.timesteps[skip * scheduler.order:]
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", side_effect=lambda *_, **__: next(fresh), create=True):
        for t in times:
            output = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, **(options or {})).prev_sample
    return Run(x, [float(t) for t in times])


def run_ours(row: Row, config: dict, steps: int, network: Network = curved, *,
             x: Tensor | None = None, skip: int = 0, options: dict | None = None,
             sigmas: list[float] | None = None) -> Run:
    """A run of ours from the same start; x is x₀ + σ·ε here. sigmas: instead of those of the row."""
    times: list[float] = []

    def recorded(x: Tensor, t: Tensor, *rest: Tensor | None) -> Tensor:
        times.append(float(t))
        return network(x, t, *rest)

    schedule = NoiseSchedule.from_hf(config)
    sigmas   = (row.sigmas(schedule, steps, config=config) if sigmas is None else sigmas)[skip:]
    denoiser = Denoiser(recorded, schedule, config["prediction_type"], row.whole)
    nothing  = Conditioning(torch.zeros(1, 1, 1, dtype=torch.float64))
    noise    = draws(steps + 1)
    x        = noise[0] * row.start_scale(sigmas[0], config=config) if x is None else x
    drawn    = {"noise": lambda i: noise[i + 1]} if row.stochastic else {}
    middle   = {"skipped": skip} if row.takes("skipped") else {}
    named    = {**row.options(schedule), **drawn, **middle, **(options or {})}
    *_, x    = row.function(lambda x, sigma: denoiser(x, sigma, nothing), x, sigmas, **named)
    return Run(x / (1 + sigmas[-1] ** 2) ** 0.5 if row.start_vp else x, times)


def as_epsilon(network: Network, prediction: str) -> Network:
    """A network that tells v or x₀, made to tell the ε that follows; for classes that only know ε."""
    def converted(x_vp: Tensor, t: Tensor | float) -> Tensor:
        sigma  = SD_SCHEDULE.sigma(float(t))
        a, s   = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5              # √ᾱ, √(1−ᾱ)
        output = network(x_vp, t)
        return {"epsilon":      output,
                "v_prediction": a * output + s * x_vp,
                "sample":       (x_vp - a * output) / s}[prediction]
    return converted


STEPS = (1, 2, 3, 5, 20, 50)


def differs_on_purpose(name: str, spacing: str, steps: int) -> str | None:
    """Why a run of ours is not diffusers'; each has its own test in test_schedulers.py. None: it is."""
    uneven = spacing == "linspace" or spacing == "trailing" and 1000 % steps
    if name in ("ddim", "pndm", "pndm_prk") and uneven:
        return "diffusers steps to t − ⌊T/N⌋, not to the next time of its list (its issue 9261)"
    if name == "pndm_prk" and steps < 4:
        return "diffusers raises where there are fewer steps than a Runge–Kutta start takes"
    if name in ("euler", "heun", "lms") and spacing in RAMPS and steps == 1:
        return "diffusers starts a single step at σ_min"
    if name in ("dpm", "dpm_3") and spacing in RAMPS and steps > 1:
        return "diffusers has σ_min twice, and a last step of length zero"
    if name.startswith("dpmpp") and spacing == "beta" and steps == 50:
        return "diffusers raises where two times are cut off to the same whole one"
    return None


@dataclass
class Comparison:
    difference: float           # of the ends
    calls: tuple[int, int]      # of the network: ours, theirs
    times: float                # largest difference of the times at which the network was called


def compare(name: str, spacing: str, prediction: str, steps: int) -> Comparison:
    """The same run by diffusers' scheduler and by ours.

    With a ramp the times differ a little (see `test_ramps_are_those_of_diffusers`), so the network then
    ignores them.
    """
    row     = SCHEDULERS[name]
    config  = config_of(spacing, prediction)
    network = curved_timeless if spacing in RAMPS else curved
    ours    = run_ours(row, config, steps, network)
    if name.startswith("pndm") or (name, prediction) == ("euler_a", "sample"):      # test_pndm_takes_epsilon
        theirs = run_theirs(row, config_of(spacing), steps, as_epsilon(network, prediction))
    else:
        theirs = run_theirs(row, config, steps, network)
    return Comparison(relative(ours.x, theirs.x), (len(ours.times), len(theirs.times)),
                      max(abs(a - b) for a, b in zip(ours.times, theirs.times, strict=False)))


def tolerances(name: str, spacing: str, prediction: str) -> tuple[float, float]:
    """(relative difference, times) that `compare` may find.

    diffusers' σ's are float32, off by 1.3e-5 at σ_min; the slope of an x₀-model, (x − x₀)/σ, feels that most.
    """
    whole = SCHEDULERS[name].whole
    times = 1e-3 if spacing in SPACINGS else 0.05 if not whole else 0 if spacing == "karras" else 1
    return 5e-5 if prediction == "sample" else 2e-5 if spacing in RAMPS else 1e-5, times


# ── A problem with a known answer ───────────────────────────────────────────────────────────────────────────

def _double(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


@dataclass(frozen=True)
class Gaussian:
    """Data of independent normal distributions N(mean, std²), for which everything is known in closed form.

    The defaults are two narrow, two wide ones, off the centre.
    """
    mean: Tensor = field(default_factory=lambda: _double(0.3, -1.2, 2.0, 0.5))
    std: Tensor  = field(default_factory=lambda: _double(0.5, 1.0, 0.2, 1.5))

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """D(x; σ) = E[x₀ | x]."""
        return self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)

    def exact(self, x: Tensor, sigma: float, end: float) -> Tensor:
        """The solution at σ = end of dx/dσ = (x − D)/σ that goes through x at σ."""
        return self.mean + (x - self.mean) * ((self.std**2 + end**2) / (self.std**2 + sigma**2)).sqrt()

    def state(self, sigma: float) -> Tensor:
        """A state that is as far from the mean as is usual at σ."""
        return self.mean + _double(1.0, -0.7, 0.4, -1.3) * (self.std**2 + sigma**2).sqrt()

    def network(self, schedule: NoiseSchedule, prediction: str = "epsilon") -> Network:
        """The perfect network: what a trained one would answer, from x_vp and t."""
        def perfect(x_vp: Tensor, t: Tensor | float, *_: object) -> Tensor:
            sigma = schedule.sigma(float(t))
            root  = (1 + sigma**2) ** 0.5
            x     = x_vp * root
            x0    = self.denoise(x, sigma)
            eps   = (x - x0) / sigma
            return {"epsilon": eps, "v_prediction": (eps - sigma * x0) / root, "sample": x0}[prediction]
        return perfect
