"""Tiny models of every family, as diffusers writes them and as one file in the names of the original code.

The names are made here from diffusers' names, the other way round than ldm reads them.
"""
import json
import re
from pathlib import Path

import diffusers
import torch
from oracles import SD_VAE, SDXL_VAE, UNETS
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.weights.vocabulary import clip_tokenizer

RESBLOCK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
            "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET     = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "time_embedding.cond_proj": "time_embed.cond_proj",
            "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
            "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
            "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
            "mid_block.resnets.1": "middle_block.2"}
CLIP     = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
            "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def ldm_unet(state):
    """diffusers' names → those of the original U-Net, for two layers a level."""
    attention = {int(name.split(".")[1]) for name in state if re.match(r"up_blocks\.\d\.attentions", name)}
    renamed   = {}
    for name, tensor in state.items():
        for ours, theirs in UNET.items():
            name = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", name)
        if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.", name):
            way, level, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), name[match.end():]
            if kind == "downsamplers":
                name = f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
            elif kind == "upsamplers":
                name = f"output_blocks.{3 * level + 2}.{2 if level in attention else 1}.{rest}"
            else:
                block = 3 * level + i + (way == "down")
                side  = "input" if way == "down" else "output"
                name  = f"{side}_blocks.{block}.{int(kind == 'attentions')}.{rest}"
        for ours, theirs in RESBLOCK.items():
            if re.match(r"(input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.", name):
                name = name.replace(f".{ours}.", f".{theirs}.")
        renamed[name] = tensor
    return renamed


def ldm_vae(state, levels=4):
    """diffusers' names → those of the original autoencoder, whose attention has convolutions of size 1."""
    renamed = {}
    for name, tensor in state.items():
        if match := re.match(r"(.*)\.mid_block\.attentions\.0\.(\w+)(\.0)?\.(\w+)$", name):
            part = {"group_norm": "norm", "to_out": "proj_out"}.get(match[2], match[2][-1])
            name = f"{match[1]}.mid.attn_1.{part}.{match[4]}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = re.sub(r"(up\.\d)\.resnets\.", r"\1.block.", name)
        name = re.sub(r"(up\.\d)\.upsamplers\.0\.", r"\1.upsample.", name)
        renamed[name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")] = tensor
    return renamed


def open_clip(state):
    """transformers' names → OpenCLIP's."""
    state   = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {"positional_embedding": state.pop("embeddings.position_embedding.weight")}
    if "text_projection.weight" in state:
        renamed["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name:
            layer, end = name.split(".self_attn.q_proj.")
            name   = f"{layer}.attn.in_proj_{end}"
            tensor = torch.cat([state[f"{layer}.self_attn.{letter}_proj.{end}"] for letter in "qkv"])
        elif re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue
        for ours, theirs in CLIP.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def extra_layer(state, index):
    """The layer behind the last one, which Stable Diffusion 2.x does not read."""
    return {name.replace(".0.", f".{index}."): torch.randn_like(tensor)
            for name, tensor in state.items() if name.startswith("transformer.resblocks.0.")}


# -- the families --------------------------------------------------------------------------------------------
SMALL   = {"block_out_channels": [32, 64, 64, 64], "sample_size": 64, "cross_attention_dim": 64,
           "_diffusers_version": "0.40.0"}
SMALL2  = {**SMALL, "attention_head_dim": [1, 1, 1, 1]}
XL      = {**SMALL, "attention_head_dim": [1, 1, 2], "block_out_channels": [32, 64, 128], "sample_size": 128,
           "transformer_layers_per_block": [1, 2, 3], "cross_attention_dim": 96,
           "projection_class_embeddings_input_dim": 64 + 6 * 256}
REFINER = {**SMALL2, "transformer_layers_per_block": 2, "sample_size": 128,
           "projection_class_embeddings_input_dim": 64 + 5 * 256}

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False,
            "set_alpha_to_one": False}
PNDM  = {**SCHEDULE, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
DDIM  = {**SCHEDULE, "_class_name": "DDIMScheduler"}
EULER = {**SCHEDULE, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}

L, H, G = "openai", "open_clip, its last layer left out", "open_clip with projection"
FAMILIES = {        # U-Net, encoders, scheduler, fields of model_index.json
    "SD 1.5":         ({**UNETS["SD 1.5"], **SMALL}, [L], PNDM, {}),
    "SD 1.5 inpaint": ({**UNETS["SD 1.5 inpaint"], **SMALL}, [L], DDIM, {}),
    "SD 2.1 base":    ({**UNETS["SD 2.1"], **SMALL2}, [H], PNDM, {}),
    "SD 2.1":         ({**UNETS["SD 2.1"], **SMALL2, "sample_size": 96}, [H],
                       {**DDIM, "prediction_type": "v_prediction"}, {}),
    "SD 2 inpaint":   ({**UNETS["SD 2.1"], **SMALL2, "in_channels": 9}, [H], DDIM, {}),
    "SDXL base":      ({**UNETS["SDXL base"], **XL}, [L, G], EULER, {"force_zeros_for_empty_prompt": True}),
    "SDXL refiner":   ({**UNETS["SDXL refiner"], **REFINER}, [G], EULER,
                       {"requires_aesthetics_score": True}),
}


def parts_of(family):
    """The random networks of a family: {"unet": …, "vae": …, "text_encoder": …}."""
    torch.manual_seed(0)
    config, encoders, _, _ = FAMILIES[family]
    unet = diffusers.UNet2DConditionModel.from_config(config)
    vae  = diffusers.AutoencoderKL.from_config(
        {**(SDXL_VAE if "XL" in family else SD_VAE), "block_out_channels": [32, 32, 64, 64]})
    for module in (unet, vae):
        for parameter in module.parameters():                   # norms and biases too: no two can be confused
            parameter.data += 0.05 * torch.randn_like(parameter)
    if family == "SD 2.1":                      # a standard deviation that tells v from ε: .2 instead of .05
        unet.up_blocks[-1].attentions[-1].transformer_blocks[0].norm1.bias.data *= 4
    parts = {"unet": unet, "vae": vae}
    for i, kind in enumerate(encoders):
        width  = 32 if kind == L and len(encoders) == 2 else 64
        config = CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, num_attention_heads=1,
                                num_hidden_layers=3, projection_dim=64,
                                hidden_act="quick_gelu" if kind == L else "gelu")
        model  = (CLIPTextModelWithProjection if kind == G else CLIPTextModel)(config)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        parts["text_encoder" + "_2" * i] = model
    return parts


def write_folder(folder: Path, family: str, parts) -> Path:
    """The parts in Hugging Face layout."""
    _, encoders, scheduler, fields = FAMILIES[family]
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.40.0", **fields}
    for name, module in parts.items():
        module.save_pretrained(folder / name)
        index[name] = [type(module).__module__.split(".")[0], type(module).__name__]
    for i, kind in enumerate(encoders):
        tokenizer = clip_tokenizer("<|endoftext|>" if kind == L else "!")
        tokenizer.save_pretrained(folder / ("tokenizer" + "_2" * i))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def checkpoint(family: str, parts, sgm: bool = False):
    """All tensors of the parts by their names in a single file. sgm: as Stability's later code stores 2.x."""
    state = {f"model.diffusion_model.{k}": t for k, t in ldm_unet(parts["unet"].state_dict()).items()}
    state |= {f"first_stage_model.{k}": t for k, t in ldm_vae(parts["vae"].state_dict()).items()}
    state |= {"alphas_cumprod": torch.ones(9), "betas": torch.ones(9), "model_ema.decay": torch.tensor(0.9)}
    xl = "XL" in family
    for i, kind in enumerate(FAMILIES[family][1]):
        encoder = parts["text_encoder" + "_2" * i].state_dict()
        prefix  = f"conditioner.embedders.{i}." if xl or sgm else "cond_stage_model."
        if kind == L:
            encoder = {f"text_model.{k.removeprefix('text_model.')}": t for k, t in encoder.items()}
            encoder["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        else:
            encoder = open_clip(encoder)
            if kind == H:
                width   = encoder["ln_final.weight"].shape[0]
                encoder |= {**extra_layer(encoder, 3), "text_projection": torch.randn(width, width)}
            encoder["logit_scale"] = torch.tensor(4.6)
        state |= {f"{prefix}{'transformer' if kind == L else 'model'}.{k}": t for k, t in encoder.items()}
    return {k: t.detach().contiguous() for k, t in state.items()}


def write_file(path: Path, state) -> Path:
    save_file({k: t.clone() for k, t in state.items()}, path)
    return path
