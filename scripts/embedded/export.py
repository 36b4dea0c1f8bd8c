"""The last stage: the trained parts as a folder in Hugging Face layout, in float16, with a model card.

Here too: `load_vae`, with which the stages take over the autoencoder from each other.
"""
from pathlib import Path

import torch
from common import replacing
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel

import ldm
from ldm.models import VAE, VAEConfig
from ldm.pipeline import Defaults
from ldm.text import ClipText
from ldm.weights import load_tokenizer, read_json

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "algorithm_type": "dpmsolver++", "solver_order": 2,
    "timestep_spacing": "trailing", "steps_offset": 1, "final_sigmas_type": "zero", "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


def load_vae(folder: Path) -> VAE:
    """A copy of the autoencoder in a folder that an earlier stage wrote; the file may be written anew."""
    vae = VAE(VAEConfig.from_hf(read_json(folder / "config.json")))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.eval()


def export(out: Path, target: Path, unet: nn.Module, size: int, card: str) -> None:
    """Writes the whole model into `target`, which is replaced."""
    text  = ClipText(load_tokenizer(out / "tokenizer"), CLIPTextModel.from_pretrained(out / "text_encoder"))
    model = ldm.Pipeline(text, unet, load_vae(out / "vae"), ldm.NoiseSchedule.from_hf(SCHEDULER),
                         SCHEDULER["prediction_type"], SCHEDULER,
                         Defaults("dpmpp_2m", steps=25, guidance_scale=3.0, height=size, width=size))
    with replacing(target) as building:
        model.save(building, torch.float16)
        (building / "README.md").write_text(card)
