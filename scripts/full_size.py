"""Stable Diffusion 1.5 at its full size, with random weights: the same picture as diffusers?

    python scripts/full_size.py                  on the CPU: 2 PNDM steps at 512 × 512 in float32 (minutes), then 512 × 768
    python scripts/full_size.py --device cuda    on a GPU: 50 PNDM steps in float16, with time and peak memory

Writes the model (860M + 84M + 123M parameters, 4.3 GB) in the Hugging Face layout into --folder unless it is there,
makes the same picture with ldm and with diffusers, and prints the largest difference on [0, 1] pixels. Exits with 1 if
that is not below the tolerance. Needs the extra `test`.
"""
import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import ldm
from ldm.models import VAE, UNet, UNetConfig, VAEConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracles import SD_VAE, UNETS
from tiny import SCHEDULER

TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}         # float32, and float16 after 50 steps
PROMPT    = "a photograph of an astronaut riding a horse"


def write(folder: Path) -> None:
    """The published configurations of Stable Diffusion 1.5, a tokenizer of single letters, random weights."""
    torch.manual_seed(0)
    words = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    text  = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                           num_attention_heads=12, hidden_act="quick_gelu", projection_dim=768, bos_token_id=52,
                           eos_token_id=53, pad_token_id=53, architectures=["CLIPTextModel"])
    files = {"unet/config.json": UNETS["SD 1.5"], "vae/config.json": SD_VAE, "text_encoder/config.json": text.to_dict(),
             "scheduler/scheduler_config.json": SCHEDULER,
             "tokenizer/vocab.json": {word: i for i, word in enumerate(words)},
             "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77,
                                                 "pad_token": "<|endoftext|>"}}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    for part, module in (("unet", UNet(UNetConfig.from_hf(UNETS["SD 1.5"]))), ("vae", VAE(VAEConfig.from_hf(SD_VAE)))):
        save_file(module.state_dict(), folder / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    save_file(CLIPTextModel(text).state_dict(), folder / "text_encoder/model.safetensors", {"format": "pt"})
    (folder / "model_index.json").write_text(json.dumps({      # last, so that a folder with it is complete
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None], "feature_extractor": [None, None]}))


def report(what: str, start: float, device: str) -> None:
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{what:32} {time.perf_counter() - start:7.1f} s    peak memory so far {peak / 2**30:5.1f} GiB", flush=True)


def ours(folder: Path, device: str, dtype: torch.dtype, steps: int, width: int = 512) -> np.ndarray:
    start = time.perf_counter()
    pipe  = ldm.load(folder, device=device, dtype=dtype)
    report("ldm: load", start, device)
    start = time.perf_counter()
    image = ldm.sample(PROMPT, pipe, steps=steps, seed=7, height=512, width=width, output_type="np")
    report(f"ldm: {steps} PNDM steps, 512 × {width}", start, device)
    return image


def theirs(folder: Path, device: str, dtype: torch.dtype, steps: int) -> np.ndarray:
    from diffusers import StableDiffusionPipeline
    start = time.perf_counter()
    pipe  = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    report("diffusers: load", start, device)
    start = time.perf_counter()
    image = pipe(PROMPT, num_inference_steps=steps, generator=[torch.Generator().manual_seed(7)], output_type="np").images
    report(f"diffusers: {steps} PNDM steps, 512 × 512", start, device)
    return image


def compare(folder: Path, device: str, steps: int) -> float:
    """The largest difference between the two pictures at 512 × 512."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    first = ours(folder, device, dtype, steps)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    second = theirs(folder, device, dtype, steps)
    print(f"pixels: mean {second.mean():.3f}, standard deviation {second.std():.3f}")
    return float(np.abs(first - second).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ldm-random-sd15")
    parser.add_argument("--steps", type=int, help="PNDM steps (default: 2 on the CPU, 50 on a GPU)")
    args  = parser.parse_args()
    steps = args.steps or (50 if args.device == "cuda" else 2)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}, "
          f"{torch.get_num_threads()} threads")
    if not (args.folder / "model_index.json").exists():
        print(f"writing {args.folder}")
        write(args.folder)
    difference = compare(args.folder, args.device, steps)
    print(f"max difference {difference:.1e}, tolerance {TOLERANCE[args.device]:.0e}")
    wide = ours(args.folder, args.device, torch.float16 if args.device == "cuda" else torch.float32, 1, width=768)
    ok   = difference < TOLERANCE[args.device] and wide.shape == (1, 512, 768, 3) and bool(np.isfinite(wide).all())
    print("ok" if ok else "FAIL")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
