"""What a single checkpoint file holds, told from its tensors: which part each belongs to, the architecture of
the parts as config.json would have it, the published family, and whether the U-Net predicts ε or v.

Such a file says none of this in words. Three things do not show in the shapes either, and are those of the
published families: the number of attention heads, the autoencoder's scaling factor, and the scheduler.
"""
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .names import State

# Beginning of a name (a regular expression), which is cut off → part. The last two: files of one part alone.
PARTS = (
    (r"model\.diffusion_model\.",                             "unet"),
    (r"(first_stage_model|vae)\.",                            "vae"),
    (r"cond_stage_model\.(transformer|model)\.",              "text_encoder"),        # SD 1.x | 2.x
    (r"conditioner\.embedders\.0\.(transformer|model)\.",     "text_encoder"),        # XL base | refiner, 2.x
    (r"conditioner\.embedders\.1\.model\.",                   "text_encoder_2"),      # XL base
    (r"(?=(encoder|decoder|quant_conv|post_quant_conv)\.)",   "vae"),
    (r"(?=(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.)",     "unet"),
)
# Beginning of a name → why such a tensor is not needed. They come before PARTS.
IGNORED = (
    (r"model_ema\.",                                             "a second U-Net, of running averages (EMA)"),
    (r"(first_stage_model\.)?(model_ema|loss|discriminator)\.",  "from training the autoencoder"),
    (r"(cond_stage_model|conditioner\.embedders\.\d)\.(logit_scale|text_projection)",
                                                                 "no picture needs it"),
    (r"(betas|alphas_cumprod|sqrt_|log_one_minus_|posterior_|lvlb_|logvar|scale_factor|denoiser\.)",
                                                                 "tables of the noise schedule"),
    (r"control_model\.",                                         "a ControlNet"),
    (r"(v_pred|ztsnr)$",                                         "marks that say what U-Net this is"),
)
UNKNOWN = "unknown"

# How to tell what a set of tensors is: part of a name → what it is, and whose second dimension says more.
CHECKPOINT = "a single-file checkpoint in LDM names"
KINDS = (
    ("noise_augmentor.",           "a Stable Diffusion 2.x unCLIP",           ""),
    ("edm_",                       "a checkpoint in EDM's formulation",       ""),        # Playground 2.5
    (".time_stack.",               "a video model",                           ""),
    ("joint_blocks.",              "a Stable Diffusion 3",                    ""),
    ("double_blocks.",             "a FLUX",                                  ""),
    ("model.diffusion_model.",     CHECKPOINT,                                ""),
    ("lora",                       "a LoRA",                                  ""),
    ("controlnet_cond_embedding.", "a ControlNet",                            ""),
    ("input_hint_block.",          "a ControlNet in LDM names",               ""),
    ("input_blocks.",              "a U-Net in LDM names",                    ""),
    ("time_embedding.",            "a U-Net with {} input channels",          "conv_in.weight"),
    ("mid.attn_1.",                "an autoencoder in LDM names",             ""),
    ("decoder.mid_block.",         "an autoencoder with {} latent channels",  "decoder.conv_in.weight"),
    ("decoder.layers.",            "a tiny autoencoder",                      ""),
    ("decoder.3.conv.",            "a tiny autoencoder in its author's names", ""),
    ("vision_model.",              "a CLIP with image encoder",               ""),
    ("token_embedding.",           "a CLIP text encoder of width {}",         "token_embedding.weight"),
    ("SelfAttention.",             "a T5 text encoder",                       ""),
    ("emb_params",                 "a textual inversion",                     ""),
    ("clip_g",                     "a textual inversion",                     ""),        # for XL
)

# The names of the published files and repositories.
TURBO      = r"(?i)sd[-_]?(xl)?[-_]turbo"
LIGHTNING  = r"(?i)sdxl[-_]lightning[-_](?P<steps>\d)step(?P<x0>_x0)?"
TIME_WIDTH = 256        # Fourier features of each number of XL's sizes


@dataclass(frozen=True)
class Family:
    """The published configuration of a family, as far as the tensors do not show it."""
    name: str
    scheduler: dict[str, Any]
    sample_size: int      = 64                                          # latent pixels
    scaling_factor: float = 0.18215
    index: dict[str, Any] = field(default_factory=dict)                 # fields of model_index.json


_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
             "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1,
             "clip_sample": False, "set_alpha_to_one": False}
_PNDM     = {**_SCHEDULE, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
_DDIM     = {**_SCHEDULE, "_class_name": "DDIMScheduler"}
_EULER    = {**_SCHEDULE, "_class_name": "EulerDiscreteScheduler"}
_EULER_A  = {**_SCHEDULE, "_class_name": "EulerAncestralDiscreteScheduler"}
_LCM      = {**_SCHEDULE, "_class_name": "LCMScheduler", "original_inference_steps": 50}
_TRAILING = {"timestep_spacing": "trailing"}
_ZEROS    = {"force_zeros_for_empty_prompt": True}

FAMILIES = {
    "1":             Family("Stable Diffusion 1.x",             _PNDM),
    "1 inpainting":  Family("Stable Diffusion 1.x inpainting",  _DDIM),
    "1 LCM":         Family("Stable Diffusion 1.x LCM",         _LCM),
    "2":             Family("Stable Diffusion 2.x base",        _PNDM),
    "2 v":           Family("Stable Diffusion 2.x",             _DDIM, 96),
    "2 inpainting":  Family("Stable Diffusion 2.x inpainting",  _DDIM),
    "2 LCM":         Family("Stable Diffusion 2.x LCM",         _LCM),
    "2 Turbo":       Family("Stable Diffusion Turbo",           {**_EULER, **_TRAILING}),
    "XL":            Family("Stable Diffusion XL base",         _EULER, 128, 0.13025, _ZEROS),
    "XL inpainting": Family("Stable Diffusion XL inpainting",   _EULER, 128, 0.13025, _ZEROS),
    "XL LCM":        Family("Stable Diffusion XL LCM",          _LCM, 128, 0.13025, _ZEROS),
    "XL Turbo":      Family("Stable Diffusion XL Turbo", {**_EULER_A, **_TRAILING}, 64, 0.13025, _ZEROS),
    "XL Lightning":  Family("Stable Diffusion XL Lightning", {**_EULER, **_TRAILING}, 128, 0.13025, _ZEROS),
    "XL refiner":    Family("Stable Diffusion XL refiner",      _EULER, 128, 0.13025,
                            {"requires_aesthetics_score": True}),
}


def kind(tensors: Mapping[str, Tensor]) -> str:
    """What a model with these tensors probably is, in words."""
    for mark, what, telling in KINDS:
        if any(mark in name for name in tensors):
            widths = [tensor.shape[1] for name, tensor in tensors.items()
                      if telling and name.endswith(telling) and tensor.ndim > 1]
            return what.format(widths[0] if widths else "unknown")
    return "something unknown"


def readable(kind: str) -> bool:
    """Whether a single file of this kind is for us: a checkpoint, or a U-Net or an autoencoder alone."""
    return kind in (CHECKPOINT, "a U-Net in LDM names") or "autoencoder" in kind


def place(name: str) -> tuple[str | None, str]:
    """(part, name in it) of a tensor; or (None, what it is), which may be `UNKNOWN`."""
    for pattern, why in IGNORED:
        if re.match(pattern, name):
            return None, why
    for pattern, part in PARTS:
        if match := re.match(pattern, name):
            return part, name[match.end():]
    return None, UNKNOWN


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, State], dict[str, str]]:
    """The tensors of each part, under their names in it; and the names of all others with what they are."""
    parts: dict[str, State] = {}
    others = {}
    for name, tensor in state.items():
        part, rest = place(name)
        if part is None:
            others[name] = rest
        else:
            parts.setdefault(part, {})[rest] = tensor
    return parts, others


def find_family(config: dict[str, Any], prediction: str, file_name: str) -> Family:
    """The row of `FAMILIES` for a U-Net's config.json. Only file names tell Turbo and Lightning."""
    vector = config.get("projection_class_embeddings_input_dim")
    if config.get("addition_embed_type") != "text_time" or vector is None:      # unCLIP has a vector, too
        family = "2" if config.get("use_linear_projection") else "1"
    else:                       # The refiner reads one encoder, so its context is as wide as the pooled text.
        refiner = config["cross_attention_dim"] == vector - 5 * TIME_WIDTH
        family  = "XL refiner" if refiner else "XL"
    variant = ("inpainting" if config.get("in_channels") == 9 else
               "Turbo" if re.match(TURBO, file_name) else
               "Lightning" if re.match(LIGHTNING, file_name) else
               "LCM" if config.get("time_cond_proj_dim") else
               "v" if prediction == "v_prediction" else "")
    return FAMILIES.get(f"{family} {variant}", FAMILIES[family])


def find_prediction(config: dict[str, Any], unet: State, others: Mapping[str, str],
                    metadata: Mapping[str, str], file_name: str) -> tuple[str, str]:
    """(one of `PREDICTIONS`, how we know)."""
    if (lightning := re.match(LIGHTNING, file_name)) and lightning["x0"]:
        return "sample", "the file's name says x0: Lightning for one step"
    if "v_pred" in others:
        return "v_prediction", "the file has the key v_pred"
    if metadata.get("modelspec.prediction_type") == "v":        # "epsilon" is what trainers write unasked
        return "v_prediction", "the file's metadata have modelspec.prediction_type = v"
    if config["in_channels"] != 4:
        return "epsilon", f"{config['in_channels']} input channels: all such published models predict ε"
    if not config["use_linear_projection"] or config["projection_class_embeddings_input_dim"]:
        return "epsilon", "what its family predicts, and the file has no key v_pred"
    # Stable Diffusion 2.x comes in both kinds, of one shape. ComfyUI found a statistic that tells them apart.
    last = max((int(name.split(".")[1]) for name in unet if name.startswith("output_blocks.")), default=0)
    name = f"output_blocks.{last}.1.transformer_blocks.0.norm1.bias"
    if name not in unet:
        return "epsilon", f"a guess: there is no {name}, which would tell"
    std  = float(unet[name].float().std(correction=0))
    return ("v_prediction", f"{name} has a standard deviation of {std:.3f}, above .09") if std > 0.09 else (
            "epsilon",      f"{name} has a standard deviation of {std:.3f}, not above .09")


def unet_config(state: State) -> dict[str, Any]:
    """A unet/config.json for a U-Net in LDM names.

    KeyError: a tensor is missing. ValueError: the layers of a level are not alike.
    """
    levels: list[list[tuple[int, int]]] = [[]]      # of each level, its layers: (width, transformer blocks)
    for block in range(1, _count(state, "input_blocks.")):
        if f"input_blocks.{block}.0.op.weight" in state:                                    # a downsampling
            levels.append([])
        else:
            levels[-1].append((state[f"input_blocks.{block}.0.out_layers.3.weight"].shape[0],
                               _count(state, f"input_blocks.{block}.1.transformer_blocks.")))
    if not levels[0] or any(level != level[:1] * len(levels[0]) for level in levels):
        raise ValueError(f"The U-Net has levels with layers of different width or depth {levels}: another "
                         "architecture than Stable Diffusion 1.x, 2.x or XL (a distilled one?)")
    widths    = [level[0][0] for level in levels]
    depths    = [level[0][1] for level in levels]
    mid_depth = _count(state, "middle_block.1.transformer_blocks.")
    context   = next((t.shape[1] for name, t in state.items() if name.endswith(".attn2.to_k.weight")), None)
    linear    = state["middle_block.1.proj_in.weight"].ndim == 2
    vector    = state.get("label_emb.0.0.weight")
    guidance  = state.get("time_embed.cond_proj.weight")
    kinds     = ["CrossAttn" if depth else "" for depth in depths]
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "block_out_channels": widths, "layers_per_block": len(levels[0]),
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types":   [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "transformer_layers_per_block": [depth or mid_depth for depth in depths],
        "num_attention_heads": [max(1, width // 64) if linear else 8 for width in widths],
        "cross_attention_dim": context, "use_linear_projection": linear,
        "addition_embed_type": None if vector is None else "text_time",
        "addition_time_embed_dim": None if vector is None else TIME_WIDTH,
        "projection_class_embeddings_input_dim": None if vector is None else vector.shape[1],
        "time_cond_proj_dim": None if guidance is None else guidance.shape[1],
    }


def vae_config(state: State) -> dict[str, Any]:
    """A vae/config.json for an autoencoder in LDM names or diffusers', but for its scaling factor."""
    if any(re.match(r"decoder\.(layers\.)?\d", name) for name in state):
        return {"_class_name": "AutoencoderTiny", "scaling_factor": 1.0}
    found = {}
    for name, tensor in state.items():
        if match := re.match(r"encoder\.down(_blocks)?\.(\d+)\.(block|resnets)\.(\d+)\.conv2\.w", name):
            found[int(match[2]), int(match[4])] = tensor.shape[0]
    levels = 1 + max((level for level, _ in found), default=0)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [found[level, 0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": len(found) // levels,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


def text_config(state: State, *, xl: bool) -> dict[str, Any]:
    """A text_encoder/config.json for a CLIP text encoder in the names of transformers or OpenCLIP.

    xl: of an XL model, which reads all layers of OpenCLIP, and the projection. Stable Diffusion 2.x does
        without the last layer of 24. A file with 23 was made from a folder, which does not have it.
    """
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    if is_open_clip(state):
        layer, mlp, words, places = ("transformer.resblocks.", "c_fc",
                                     "token_embedding.weight", "positional_embedding")
    else:
        layer, mlp, words, places = ("encoder.layers.", "fc1", "embeddings.token_embedding.weight",
                                     "embeddings.position_embedding.weight")
    layers      = _count(state, layer)
    size, width = state[words].shape
    config = {"architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
              "vocab_size": size, "hidden_size": width, "num_attention_heads": max(1, width // 64),
              "num_hidden_layers": layers, "max_position_embeddings": len(state[places]),
              "intermediate_size": len(state[f"{layer}0.mlp.{mlp}.weight"])}
    if not is_open_clip(state):
        return config
    if xl:
        return {**config, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu",
                "projection_dim": state["text_projection"].shape[1]}
    whole = layers == 24 or layers != 23 and "text_projection" in state
    return {**config, "hidden_act": "gelu", "num_hidden_layers": layers - whole}


def is_open_clip(state: State) -> bool:
    """Whether a text encoder is in OpenCLIP's names."""
    return any(name.startswith("transformer.resblocks.") for name in state)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow the prefix."""
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})
