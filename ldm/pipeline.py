"""A pipeline is the parts of a model in one place, no more: no part knows it, and any part can be replaced.

    pipeline = dataclasses.replace(pipeline, vae=my_vae)
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import schedulers, weights
from .denoiser import Conditioning
from .models import VAE, UNet, UNetConfig, VAEConfig
from .noise_schedule import NoiseSchedule
from .text import ClipText

EMBEDDED = Path(__file__).parent / "assets" / "shapes"      # the small model of the package


@dataclass(frozen=True)
class Defaults:
    """What a call uses where it does not say otherwise; from the model's own files."""
    scheduler: str        = "dpmpp_2m"
    steps: int            = 50
    guidance_scale: float = 7.5
    height: int           = 512       # pixels
    width: int            = 512


@dataclass(frozen=True)
class Pipeline:
    """The parts of a latent diffusion model.

    text:       N prompts → Conditioning of N.
    unet:       the network F(x, t, context, vector) → tensor.
    vae:        pictures ⇄ scaled latents.
    schedule:   σ(t), t(σ).
    prediction: "epsilon", "v_prediction" or "sample".
    scheduler_config: the model's scheduler_config.json, from which a scheduler's row takes spacing, offset
                and end of the σ's.
    defaults:   what a call uses where it does not say otherwise.
    name:       where it came from.
    """
    text: Callable[[Sequence[str]], Conditioning]
    unet: Callable[..., Tensor]
    vae: VAE
    schedule: NoiseSchedule
    prediction: str = "epsilon"
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Defaults = Defaults()
    name: str = ""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, H, W) in [−1, 1] → mean and std of the scaled latents (N, 4, H/8, W/8), float32."""
        weight    = next(self.vae.parameters())
        mean, std = self.vae.encode(images.to(weight))
        return mean.float(), std.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, 4, h, w) → pictures (N, 3, 8h, 8w), about in [−1, 1], in float32.

        One picture at a time: no part takes more memory than the decoder, and it does not gain by batches.
        """
        weight = next(self.vae.parameters())
        return torch.cat([self.vae.decode(z.to(weight)).float() for z in latents.split(1)])


def load(name: str | Path | None = None, *, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, variant: str | None = None,
         revision: str | None = None) -> Pipeline:
    """Loads a Stable Diffusion 1.x or 2.x model in Hugging Face layout.

    Args:
        name:     None for the small model inside the package; a folder; or a hub id ("organisation/model"),
                  whose files are downloaded unless they are in the cache. A folder needs no network.
        device:   default: CUDA, else MPS, else the CPU.
        dtype:    of U-Net, text encoder and autoencoder; default: float16 on CUDA, otherwise float32. An
                  autoencoder whose config says `force_upcast` stays in float32 where float16 is asked for.
        variant:  such as "fp16": the files with that word in their names, where a component has them.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: the model cannot be found or fetched.
        ValueError: a file is damaged, does not fit its config, or is of an architecture that ldm does not
            implement; or device, dtype or variant do not exist.
    """
    device = _device(device)
    dtype  = _dtype(dtype, device)
    folder = weights.find(EMBEDDED if name is None else name, variant=variant, revision=revision)
    index  = weights.read_json(folder / "model_index.json")
    if (index.get("text_encoder_2") not in (None, [None, None])
            or "StableDiffusionXL" in str(index.get("_class_name"))):
        raise ValueError(f"{folder} is a Stable Diffusion XL model. ldm has its U-Net and autoencoder "
                         f"(ldm.models), but cannot load the whole as a pipeline yet; "
                         f"Stable Diffusion 1.x and 2.x it can.")

    def config(part: str, file: str = "config.json") -> dict[str, Any]:
        return weights.read_json(folder / part / file)

    unet_config, vae_config = UNetConfig.from_hf(config("unet")), VAEConfig.from_hf(config("vae"))
    scheduler_config = config("scheduler", "scheduler_config.json")
    vae_dtype  = torch.float32 if dtype == torch.float16 and vae_config.force_upcast else dtype
    unet = weights.load_module(lambda: UNet(unet_config), folder / "unet",
                               variant=variant, device=device, dtype=dtype)
    vae  = weights.load_module(lambda: VAE(vae_config), folder / "vae",
                               variant=variant, device=device, dtype=vae_dtype,
                               rename=weights.rename_old_vae_attention)
    text = ClipText(weights.load_tokenizer(folder / "tokenizer"),
                    weights.load_text_encoder(folder / "text_encoder",
                                              variant=variant, device=device, dtype=dtype))

    own  = index.get("_ldm") or {}         # our own key in model_index.json; diffusers ignores names with a _
    size = (unet_config.sample_size or 64) * vae_config.downscale
    return Pipeline(text, unet, vae, NoiseSchedule.from_hf(scheduler_config),
                    prediction       = scheduler_config.get("prediction_type") or "epsilon",
                    scheduler_config = scheduler_config,
                    defaults         = Defaults(scheduler      = schedulers.default_name(scheduler_config),
                                                steps          = own.get("steps", 50),
                                                guidance_scale = own.get("guidance_scale", 7.5),
                                                height=size, width=size),
                    name             = "embedded" if name is None else str(name))


def _device(device: str | torch.device | None) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is None:
        return torch.device("cuda" if there["cuda"] else "mps" if there["mps"] else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; use 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    if not there.get(device.type, True):
        raise ValueError(f"device {str(device)!r} was asked for, but this PyTorch ({torch.__version__}) "
                         f"finds none; leave device out to take what there is.")
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; use 'float32', 'float16' or 'bfloat16'.")
    return found
