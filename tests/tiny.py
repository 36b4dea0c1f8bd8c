"""A whole Stable Diffusion 1.5 of a few thousand parameters, random, as diffusers writes it to a folder."""
import json
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase

import diffusers
import numpy as np
import torch
from oracles import SD_VAE, UNETS, their_scheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import ldm
from ldm.schedulers import SCHEDULERS

SCHEDULER = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "num_train_timesteps": 1000,
             "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
             "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}


WORDS = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase),
         "<|startoftext|>", "<|endoftext|>"]
SPECIAL_TOKENS = {"bos_token_id": len(WORDS) - 2, "eos_token_id": len(WORDS) - 1,
                  "pad_token_id": len(WORDS) - 1}


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that knows no merges: a token for each letter."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}))


def write(folder: Path, *, prediction: str = "epsilon", in_channels: int = 4) -> Path:
    """Writes the model. Returns the folder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(
        {**UNETS["SD 1.5"], "block_out_channels": [16, 32, 32, 32], "attention_head_dim": 4,
         "norm_num_groups": 8, "cross_attention_dim": 24, "sample_size": 8, "in_channels": in_channels,
         "_diffusers_version": "0.40.0"})           # in older files, diffusers makes 64 of a sample_size of 8
    vae = diffusers.AutoencoderKL.from_config(
        {**SD_VAE, "block_out_channels": [8, 16, 16, 24], "norm_num_groups": 4})
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=24, intermediate_size=48, num_attention_heads=4,
        num_hidden_layers=3, **SPECIAL_TOKENS))
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=diffusers.PNDMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    config = {**SCHEDULER, **({} if prediction == "epsilon" else {"prediction_type": prediction})}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return folder


@lru_cache(maxsize=2)
def theirs(folder: Path) -> diffusers.StableDiffusionPipeline:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_pictures(folder: Path, name: str, seeds: list[int], **arguments) -> np.ndarray:
    """(N, H, W, 3) in [0, 1] by diffusers, with a row's scheduler and one CPU generator for each picture."""
    pipeline = theirs(folder)
    config   = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    pipeline.scheduler = their_scheduler(SCHEDULERS[name], config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(generator=generators, num_images_per_prompt=len(seeds), output_type="np",
                    **arguments).images


def picture_difference(folder: Path, name: str, steps: int = 7) -> float:
    """The largest difference between a picture of ours and of diffusers, for a named scheduler, on [0, 1]."""
    prompts = {"prompt": "a red cat", "negative_prompt": "bad", "height": 64, "width": 72}
    theirs = their_pictures(folder, name, [5, 9], num_inference_steps=steps, **prompts)
    ours = ldm.sample(model=ldm.load(folder, device="cpu"), scheduler=name, steps=steps, seed=[5, 9],
                      num_images=2, output_type="np", **prompts)
    return float(np.abs(ours - theirs).max())
