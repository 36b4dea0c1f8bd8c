"""Contracts between the parts of a pipeline, checked where one is put together.

Parts of different models often fit in shape and then make noise, or fail deep inside a network. What their
configs tell against each other is said here, before anything runs. A part of one's own, which has no such
config, is taken as it is.
"""
import warnings
from typing import Any

from .denoiser import check_prediction
from .models import VAE, TinyVAE, TinyVAEConfig, UNet, UNetConfig, VAEConfig
from .text import ClipText, JoinedText

SCALES = {False: 0.18215, True: 0.13025}    # of the latents: in Stable Diffusion 1.x and 2.x, and in XL


def check(pipeline: Any) -> None:
    """Raises ValueError, a sentence that names both, if two parts of a `Pipeline` cannot belong together.
    Warns if they only seem not to."""
    check_prediction(pipeline.prediction)
    text, unet, vae = (getattr(part, "config", part) for part in (pipeline.text, pipeline.unet, pipeline.vae))
    if isinstance(unet, UNetConfig):
        if isinstance(text, (ClipText, JoinedText)):
            _text_and_unet(text, unet)
        if isinstance(vae, (VAEConfig, TinyVAEConfig)):
            _vae_and_unet(vae, unet)
        expected = pipeline.scheduler_config.get("prediction_type") or pipeline.prediction
        if pipeline.prediction != expected:
            raise ValueError(f"The U-Net predicts {pipeline.prediction!r}, but the scheduler_config is for "
                             f"{expected!r}; make both the same, as load(…, prediction=…) does.")
    if pipeline.prediction == "epsilon" and pipeline.schedule.betas[-1] == 1:
        raise ValueError("The U-Net predicts 'epsilon', but the schedule ends in pure noise (an SNR of 0), "
                         "where ε says nothing about the picture; such schedules are for 'v_prediction': "
                         "if it predicts v, load(…, prediction='v_prediction').")
    if isinstance(pipeline.unet, UNet) and isinstance(pipeline.vae, (VAE, TinyVAE)):
        here, there = (next(part.parameters()).device for part in (pipeline.unet, pipeline.vae))
        if here != there:
            raise ValueError(f"The U-Net is on {here}, the autoencoder on {there}; load both with the same "
                             f"device=, or move one of them there with .to().")


def _text_and_unet(text: ClipText | JoinedText, unet: UNetConfig) -> None:
    models = [text.first.model, text.second.model] if isinstance(text, JoinedText) else [text.model]
    width  = sum(model.config.hidden_size for model in models)
    if width != unet.context_dim:
        raise ValueError(f"The text encoder gives states of width {width}, but the U-Net reads a context of "
                         f"width {unet.context_dim}; take both from the same model.")
    if unet.vector_dim is not None and unet.vector_time_dim is not None:
        pooled = models[-1].config.projection_dim if hasattr(models[-1], "text_projection") else 0
        wanted = [unet.vector_dim - count * unet.vector_time_dim for count in (6, 5)]     # see `sizes.Sizes`
        if pooled not in wanted:
            raise ValueError(f"The text encoder gives a pooled text of width {pooled}, but the U-Net reads "
                             f"one of width {wanted[0]} (Stable Diffusion XL) or {wanted[1]} (its refiner); "
                             f"take both from the same model.")


def _vae_and_unet(vae: VAEConfig | TinyVAEConfig, unet: UNetConfig) -> None:
    if vae.latent_channels != unet.out_channels or vae.latent_channels > unet.in_channels:
        raise ValueError(f"The autoencoder has latents of {vae.latent_channels} channels, but the U-Net "
                         f"takes {unet.in_channels}, gives {unet.out_channels}; take both from one family.")
    xl = unet.vector_dim is not None
    if vae.scaling_factor == SCALES[not xl]:
        warnings.warn(f"The autoencoder scales its latents by {vae.scaling_factor}, but the published U-Nets "
                      f"{'with' if xl else 'without'} a vector learnt on latents scaled by {SCALES[xl]}. If "
                      f"this is one of them, take an autoencoder of its family; if its file is of that "
                      f"family and does not tell, load_vae(…, scaling_factor={SCALES[xl]}).", stacklevel=6)
