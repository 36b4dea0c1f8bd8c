"""One model of each family, of a few thousand random parameters, as diffusers writes it to a folder."""
import json
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import diffusers
import numpy as np
import torch
from oracles import SD, TINY_UNETS, TINY_VAES, their_scheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import ldm
from ldm.schedulers import SCHEDULERS

# "!" comes first and the end token last, as in CLIP's own vocabulary.
WORDS = ["!", *ascii_lowercase, "!</w>", *(f"{letter}</w>" for letter in ascii_lowercase),
         "<|startoftext|>", "<|endoftext|>"]

# What is published for the scheduler; and for each text encoder: the widths of its states and of its pooled
# text (None: it has no projection), its activation, and what it pads with.
_CLIP, _OPEN = ("quick_gelu", "<|endoftext|>"), ("gelu", "!")
FAMILIES = {
    "SD 1.5":       ({"_class_name": "PNDMScheduler", "skip_prk_steps": True},
                     {"": (24, None, *_CLIP)}),
    "SD 2.1":       ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
                     {"": (24, None, *_OPEN)}),
    "SDXL base":    ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
                     {"": (8, None, *_CLIP), "_2": (16, 20, *_OPEN)}),
    "SDXL refiner": ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
                     {"_2": (24, 20, *_OPEN)}),
}


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer that knows no merges: a token for each letter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}))
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(width: int, pooled: int | None, activation: str) -> CLIPTextModel:
    """Three layers; the ids of the special tokens are those of all published files, wrong as they are."""
    config = CLIPTextConfig(vocab_size=len(WORDS), hidden_size=width, intermediate_size=48,
                            num_attention_heads=4, num_hidden_layers=3, hidden_act=activation,
                            projection_dim=pooled or width,
                            bos_token_id=0, eos_token_id=2, pad_token_id=1)
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config)


def write(folder: Path, family: str = "SD 1.5", *, prediction: str | None = None, zero_empty: bool = True,
          **unet: Any) -> Path:
    """Writes a model. Returns the folder.

    zero_empty: SDXL base's force_zeros_for_empty_prompt.
    unet:       fields of the U-Net's config.json that differ from the family's.
    """
    torch.manual_seed(0)
    scheduler, encoders = FAMILIES[family]
    config = {**TINY_UNETS[family], "sample_size": 8, **unet,
              "_diffusers_version": "0.40.0"}       # in older files, diffusers makes 64 of a sample_size of 8
    parts: dict[str, Any] = {       # the autoencoder first, so that base and refiner have the same
        "vae":       diffusers.AutoencoderKL.from_config(TINY_VAES["SDXL" if "XL" in family else "SD 1.5"]),
        "unet":      diffusers.UNet2DConditionModel.from_config(config),
        "scheduler": diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True)}      # rewritten below
    for end, (width, pooled, activation, pad) in encoders.items():
        parts[f"tokenizer{end}"]    = write_tokenizer(folder / f"tokenizer{end}", pad)
        parts[f"text_encoder{end}"] = text_encoder(width, pooled, activation)
    if "XL" not in family:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    elif family == "SDXL base":
        parts |= {"force_zeros_for_empty_prompt": zero_empty}
    else:
        parts |= {"text_encoder": None, "tokenizer": None, "force_zeros_for_empty_prompt": False,
                  "requires_aesthetics_score": True}
    their_class(family, "img2img" if family == "SDXL refiner" else "sample")(**parts).save_pretrained(folder)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(
        {**SD, **scheduler, **({"prediction_type": prediction} if prediction else {})}))
    return folder


def their_class(family: str, task: str) -> type[diffusers.DiffusionPipeline]:
    """The class of diffusers for a family ("… XL …" or not) and a task: sample, img2img or inpaint."""
    middle = {"sample": "", "img2img": "Img2Img", "inpaint": "Inpaint"}[task]
    return getattr(diffusers, f"StableDiffusion{'XL' if 'XL' in family else ''}{middle}Pipeline")


@lru_cache(maxsize=2)
def theirs(folder: Path, task: str = "sample") -> diffusers.DiffusionPipeline:
    family   = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = their_class(family, task).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_pictures(folder: Path, name: str, seeds: list[int], task: str = "sample",
                   **arguments: Any) -> np.ndarray:
    """(N, H, W, 3) in [0, 1] by diffusers, with a row's scheduler and one CPU generator for each picture."""
    pipeline = theirs(folder, task)
    config   = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    pipeline.scheduler = their_scheduler(SCHEDULERS[name], config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(**{"generator": generators, "num_images_per_prompt": len(seeds), "output_type": "np",
                       **arguments}).images


def picture_difference(folder: Path, name: str, steps: int = 7) -> float:
    """The largest difference between a picture of ours and of diffusers, for a named scheduler, on [0, 1]."""
    prompts = {"prompt": "a red cat", "negative_prompt": "bad", "height": 64, "width": 72}
    theirs = their_pictures(folder, name, [5, 9], num_inference_steps=steps, **prompts)
    ours = ldm.sample(model=ldm.load(folder, device="cpu"), scheduler=name, steps=steps, seed=[5, 9],
                      num_images=2, output_type="np", **prompts)
    return float(np.abs(ours - theirs).max())
