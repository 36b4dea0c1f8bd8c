"""Stage 4: the trained parts as a folder in Hugging Face layout, in float16, with a model card.

Here too: `save_part` and `load_vae`, with which the stages hand parts to each other in the same layout.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from ldm.models.unet import UNetConfig
from ldm.models.vae import VAE, VAEConfig

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "algorithm_type": "dpmsolver++", "solver_order": 2,
    "timestep_spacing": "trailing", "steps_offset": 1, "final_sigmas_type": "zero", "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
    "_ldm": {"steps": 25, "guidance_scale": 3.0},                # our defaults; names with a _ are ours alone
    "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
    "safety_checker": [None, None], "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}


def unet_to_hf(config: UNetConfig) -> dict[str, Any]:
    """The `config.json` from which `UNetConfig.from_hf` makes this config again."""
    cross = ["CrossAttn" if depth else "" for depth in config.depth]
    return {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", "act_fn": "silu",
            "attention_head_dim": list(config.heads), "block_out_channels": list(config.channels),
            "center_input_sample": False, "cross_attention_dim": config.context_dim,
            "down_block_types": [f"{kind}DownBlock2D" for kind in cross],
            "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
            "in_channels": config.in_channels,
            "layers_per_block": config.layers, "mid_block_scale_factor": 1, "norm_eps": config.eps,
            "norm_num_groups": config.groups, "out_channels": config.out_channels,
            "sample_size": config.sample_size,
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(cross)],
            "use_linear_projection": config.linear_projection}


def vae_to_hf(config: VAEConfig, size: int) -> dict[str, Any]:
    """The `config.json` from which `VAEConfig.from_hf` makes this config again; `size`: a picture's side."""
    levels = len(config.channels)
    return {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0", "act_fn": "silu",
            "block_out_channels": list(config.channels), "down_block_types": ["DownEncoderBlock2D"] * levels,
            "force_upcast": config.force_upcast, "in_channels": config.in_channels,
            "latent_channels": config.latent_channels, "layers_per_block": config.layers,
            "norm_num_groups": config.groups, "out_channels": config.out_channels, "sample_size": size,
            "scaling_factor": config.scaling_factor,
            "up_block_types": ["UpDecoderBlock2D"] * levels}


def save_part(module: nn.Module, config: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    tensors = {name: value.detach().to("cpu", dtype).contiguous()
               for name, value in module.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def load_vae(folder: Path) -> VAE:
    vae = VAE(VAEConfig.from_hf(json.loads((folder / "config.json").read_text())))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.eval()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def export(out: Path, target: Path, unet: nn.Module, unet_config: UNetConfig, size: int, card: str) -> None:
    """Writes the whole model into `target`, which is replaced."""
    vae = load_vae(out / "vae")
    building = target.with_name(target.name + ".new")
    shutil.rmtree(building, ignore_errors=True)
    unet_config = replace(unet_config, sample_size=size // vae.config.downscale)
    save_part(unet, unet_to_hf(unet_config), building / "unet", torch.float16)
    save_part(vae, vae_to_hf(vae.config, size), building / "vae", torch.float16)
    CLIPTextModel.from_pretrained(out / "text_encoder").half().save_pretrained(building / "text_encoder")
    shutil.copytree(out / "tokenizer", building / "tokenizer")
    (building / "scheduler").mkdir()
    write_json(building / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(building / "model_index.json", INDEX)
    (building / "README.md").write_text(card)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
