"""A pipeline is the parts of a model in one place, no more: no part knows it, and any part can be replaced.

    pipeline = dataclasses.replace(pipeline, vae=my_vae)
"""
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import contracts, schedulers, weights
from .denoiser import Conditioning, check_prediction
from .models import VAE, TinyVAE, UNet, UNetConfig
from .models.layers import timestep_embedding
from .noise_schedule import NoiseSchedule
from .sizes import Sizes
from .text import ClipText, JoinedText

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
    """The parts of a latent diffusion model. ValueError: parts that do not fit each other, see contracts.py.

    text:       N prompts → Conditioning of N.
    unet:       the network F(x, t, context, vector) → tensor.
    vae:        pictures ⇄ scaled latents.
    schedule:   σ(t), t(σ).
    prediction: "epsilon", "v_prediction" or "sample".
    scheduler_config: the model's scheduler_config.json, from which a scheduler's row takes spacing, offset
                and end of the σ's.
    defaults:   what a call uses where it does not say otherwise.
    name:       where it came from.
    zero_empty: whether an empty negative prompt stands for zeros, as in the base of Stable Diffusion XL
                (`force_zeros_for_empty_prompt`); there, " " stands for the states of the empty text.
    """
    text: Callable[[Sequence[str]], Conditioning]
    unet: Callable[..., Tensor]
    vae: VAE | TinyVAE
    schedule: NoiseSchedule
    prediction: str = "epsilon"
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Defaults = Defaults()
    name: str = ""
    zero_empty: bool = False

    def __post_init__(self) -> None:
        contracts.check(self)

    @property
    def device(self) -> torch.device:
        """Where the pictures are made."""
        return next(self.vae.parameters()).device

    def condition(self, prompts: Sequence[str], height: int, width: int, sizes: Sizes = Sizes(), *,
                  negative: bool = False) -> Conditioning:
        """All that the network is told besides x and σ, for N prompts.

        The pooled text gets the features of the `sizes` behind it; a vector that is complete stays as it is.

        height, width: of the pictures, in pixels; read by Stable Diffusion XL only, as are `sizes`.
        negative:      these are prompts to lead away from: where `zero_empty` says so, empty ones are zeros.
        """
        cond = self.text(prompts)
        context, vector = cond.context, cond.vector
        config = getattr(self.unet, "config", None)                   # a network of one's own needs no config
        wanted: int | None   = getattr(config, "vector_dim", None)
        features: int | None = getattr(config, "vector_time_dim", None)               # of each of the numbers
        if vector is None or wanted is None or features is None or vector.shape[1] == wanted:
            return cond                                               # nothing is missing
        if negative and self.zero_empty:
            some = torch.tensor([[prompt != ""] for prompt in prompts], device=vector.device)         # (N, 1)
            context, vector = context * some[:, None], vector * some
        count   = (wanted - vector.shape[1]) // features
        numbers = torch.tensor(sizes.numbers(height, width, count, negative=negative))
        told    = timestep_embedding(numbers, features).flatten().to(vector).expand(len(vector), -1)
        return replace(cond, context=context, vector=torch.cat([vector, told], dim=1))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, H, W) in [−1, 1] → mean and std of the scaled latents (N, 4, H/8, W/8), float32.

        One picture at a time, as in `decode`. FloatingPointError: see `finite`.
        """
        weight    = next(self.vae.parameters())
        found     = [self.vae.encode(image.to(weight)) for image in images.split(1)]
        mean, std = (torch.cat(parts).float() for parts in zip(*found, strict=True))
        return finite(mean, "autoencoder"), std

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, 4, h, w) → pictures (N, 3, 8h, 8w), about in [−1, 1], in float32.

        One picture at a time: no part takes more memory than the decoder, and it does not gain by batches.
        FloatingPointError: see `finite`.
        """
        weight   = next(self.vae.parameters())
        pictures = [self.vae.decode(z.to(weight)).float() for z in latents.split(1)]
        return finite(torch.cat(pictures), "autoencoder")

    def save(self, folder: str | Path, dtype: str | torch.dtype | None = None) -> None:
        """Writes the model as a folder in Hugging Face layout, which `load` and diffusers read.

        folder: a new or an empty one. It gets its name when everything is in it.
        dtype:  of the weights in the files; None leaves each part in its own.

        FileExistsError: the folder has something in it. ValueError: a part of one's own, or changed layers,
        for which the layout has no place; numbers too large for the dtype.
        """
        unet, vae, text = self.unet, self.vae, self.text
        if not (isinstance(unet, UNet) and isinstance(vae, (VAE, TinyVAE))
                and isinstance(text, (ClipText, JoinedText))):
            raise ValueError(f"Only a model of our own parts has a Hugging Face layout, not one of "
                             f"{', '.join(type(part).__name__ for part in (text, unet, vae))}.")
        dtype = None if dtype is None else _dtype(dtype, self.device)
        xl    = unet.config.vector_dim is not None
        if isinstance(text, JoinedText):
            encoders = {"text_encoder": text.first, "text_encoder_2": text.second}
        else:
            encoders = {"text_encoder_2" if xl else "text_encoder": text}
        if any(encoder.penultimate != xl for encoder in encoders.values()):
            raise ValueError("No file says which states of the text encoder are read: `penultimate` must be "
                             "as `load` sets it, True for Stable Diffusion XL and False for others.")

        config = {"_class_name": "DDIMScheduler",
                  **(self.scheduler_config or {"clip_sample": False}), "prediction_type": self.prediction}
        if not np.array_equal(NoiseSchedule.from_hf(config).betas, self.schedule.betas):
            betas   = self.schedule.betas
            config |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": bool(betas[-1] == 1),
                       "num_train_timesteps": len(betas)}
        sample_size = unet.config.sample_size or self.defaults.height // vae.config.downscale
        size        = sample_size * vae.config.downscale
        derived     = {"scheduler": schedulers.default_name(config), "height": size, "width": size}
        own         = {key: value for key, value in asdict(self.defaults).items()
                       if value != derived.get(key)}

        with weights.new_folder(Path(folder)) as new:
            weights.write_network(unet, new / "unet", dtype, sample_size=sample_size)
            weights.write_network(vae, new / "vae", dtype,
                                  **({"sample_size": size} if isinstance(vae, VAE) else {}))
            for name, encoder in encoders.items():
                weights.write_text_encoder(encoder.model, new / name, dtype)
                weights.write_tokenizer(encoder.tokenizer, new / name.replace("text_encoder", "tokenizer"))
            weights.write_json(new / "scheduler" / "scheduler_config.json", config)
            weights.write_json(new / "model_index.json", weights.model_index(
                unet.config, vae.config, {name: encoder.model for name, encoder in encoders.items()},
                config["_class_name"], own, self.zero_empty))


def finite(x: Tensor, part: str) -> Tensor:
    """x, the result of a part of the model. FloatingPointError: NaN or ∞ in it, which would be black."""
    if not x.isfinite().all():
        raise FloatingPointError(f"The {part} gave numbers that are not finite; the picture would be black. "
                                 f"If it runs in float16, which ends at 65504, load the model with "
                                 f"dtype='bfloat16' or 'float32'; if not, weights or inputs are at fault.")
    return x


def load(name: str | Path | None = None, *, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, variant: str | None = None, revision: str | None = None,
         prediction: str | None = None, ema: bool = False, vae: str | Path | None = None) -> Pipeline:
    """Loads a Stable Diffusion 1.x, 2.x or XL model: a folder in Hugging Face layout, or a checkpoint file.

    A single file needs nothing else: its architecture is read from its tensors; the tokenizer and the
    published configurations are in the package. `ldm.inspect` tells what is in a file. Of pickles (`.ckpt`)
    only tensors are read, and nothing is run.

    Args:
        name:     None for the small model inside the package; a folder; a checkpoint file (`.safetensors`,
                  `.ckpt`); or a hub id ("organisation/model"), whose files are downloaded unless they are in
                  the cache. Folders and files need no network.
        device:   default: CUDA, else MPS, else the CPU.
        dtype:    of U-Net, text encoder and autoencoder; default: float16 on CUDA, otherwise float32. An
                  autoencoder whose config says `force_upcast` stays in float32 where float16 is asked for.
        variant:  such as "fp16": the files with that word in their names, where a component has them (also
                  that of `vae`).
        revision: branch, tag or commit on the hub.
        prediction: "epsilon", "v_prediction" or "sample", where the files are silent or wrong.
        ema:      of a checkpoint file with two U-Nets, take the one of running averages.
        vae:      another autoencoder, as for `load_vae`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: the model cannot be found or fetched.
        ValueError: a file is damaged, does not fit its config, or is of an architecture that ldm does not
            implement; or device, dtype, prediction or variant do not exist.
    """
    if not isinstance(name, str | PathLike | None):
        raise TypeError(f"A model is a Pipeline, a folder, a file or a hub id; got {type(name).__name__}.")
    if prediction is not None:
        check_prediction(prediction)
    device = _device(device)
    dtype  = _dtype(dtype, device)
    source = weights.open_source(EMBEDDED if name is None else name, variant=variant, revision=revision,
                                 prediction=prediction, ema=ema)
    if not source.encoders:
        raise ValueError(f"{source.path} has no text encoder: use a complete model.")
    index, scheduler_config = source.index, source.scheduler
    own   = index.get("_ldm") or {}        # our own key in model_index.json; diffusers ignores names with a _
    known = {one.name for one in fields(Defaults)}
    if not isinstance(own, dict) or own.keys() - known:
        raise ValueError(f"model_index.json in {source.path} has under _ldm {own!r}; there may be values for "
                         f"{', '.join(sorted(known))}.")

    unet = weights.load_part("unet", source.part("unet"), device=device, dtype=dtype)
    xl   = unet.config.vector_dim is not None
    text = [ClipText(source.tokenizer(part),
                     weights.load_part(part, source.part(part), device=device, dtype=dtype), penultimate=xl)
            for part in source.encoders]
    if vae is None:
        autoencoder = _vae(source.part("vae"), device, dtype)
    elif Path(vae).expanduser().is_file():
        autoencoder = load_vae(vae, device=device, dtype=dtype, scaling_factor=contracts.SCALES[xl])
    else:
        autoencoder = load_vae(vae, device=device, dtype=dtype, variant=variant)

    if not xl:              # diffusers' pipelines of 1.x and 2.x amend these fields of old files, too
        scheduler_config = {**scheduler_config, "steps_offset": 1, "clip_sample": False}

    scheduler    = schedulers.default_name(scheduler_config)
    steps, scale = _usual(unet.config, scheduler, Path(name or "").name)
    size = (unet.config.sample_size or 64) * autoencoder.config.downscale
    return Pipeline(text[0] if len(text) == 1 else JoinedText(*text), unet, autoencoder,
                    NoiseSchedule.from_hf(scheduler_config),
                    prediction       = scheduler_config.get("prediction_type") or "epsilon",
                    scheduler_config = scheduler_config,
                    defaults         = Defaults(**{"scheduler": scheduler, "steps": steps,
                                                   "guidance_scale": scale, "height": size, "width": size,
                                                   **own}),
                    name             = "embedded" if name is None else str(name),
                    zero_empty       = bool(index.get("force_zeros_for_empty_prompt")))


def _usual(config: UNetConfig, scheduler: str, name: str) -> tuple[int, float]:
    """Steps and guidance scale of the published models of a kind. Only names tell Turbo and Lightning."""
    if re.match(weights.TURBO, name):
        return 1, 1.0
    if lightning := re.match(weights.LIGHTNING, name):
        return int(lightning["steps"]), 1.0
    if scheduler == "lcm":
        return 4, 1.0 if config.guidance_dim is None else 8.5
    return 50, 7.5 if config.vector_dim is None else 5.0


def load_vae(name: str | Path, *, device: str | torch.device | None = None,
             dtype: str | torch.dtype | None = None, variant: str | None = None, revision: str | None = None,
             scaling_factor: float | None = None) -> VAE | TinyVAE:
    """Loads an autoencoder alone, for `dataclasses.replace(pipeline, vae=…)`; `load(vae=NAME)` does both.

    Args:
        name:   a folder with the autoencoder's `config.json`, or a pipeline's; a file (`.safetensors`,
                `.ckpt`, `.pt`) of an autoencoder or a whole model, in LDM names or diffusers'; a half of
                TAESD beside the other half; or the hub id of such a folder.
        device, dtype, variant, revision: as for `load`.
        scaling_factor: of the latents, for a file of an autoencoder alone, or an old config.json, which do
                not tell it. Default: Stable Diffusion 1.x's and 2.x's .18215 (XL has .13025); 1 for TAESD.

    Errors are those of `load`.
    """
    device = _device(device)
    return _vae(weights.open_vae(name, variant=variant, revision=revision, scaling_factor=scaling_factor),
                device, _dtype(dtype, device))


def _vae(part: weights.Part, device: torch.device, dtype: torch.dtype) -> VAE | TinyVAE:
    upcast = dtype == torch.float16 and weights.vae_config(part).force_upcast
    dtype  = torch.float32 if upcast else dtype
    return weights.load_part("vae", part, device=device, dtype=dtype)


def _device(device: str | torch.device | None) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is None:
        return torch.device("cuda" if there["cuda"] else "mps" if there["mps"] else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; use 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    if not there.get(device.type, device.type == "cpu"):
        raise ValueError(f"device {str(device)!r} was asked for, but this PyTorch ({torch.__version__}) "
                         f"finds none; leave device out to take what there is.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()}, "
                         f"counted from 0.")
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype is {dtype!r}; use 'float32', 'float16' or 'bfloat16'.")
    return found
