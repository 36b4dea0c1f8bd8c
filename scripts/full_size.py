"""Models at their full size, with random weights.

    python scripts/full_size.py                  on the CPU: 2 PNDM steps in float32, some minutes
    python scripts/full_size.py --device cuda    on a GPU: 50 PNDM steps in float16

Stable Diffusion 1.5: the same picture as diffusers? Writes the model (860M + 84M + 123M parameters, 4.3 GB)
in the Hugging Face layout into --folder unless it is there, makes the same picture of 512 × 512 pixels with
ldm and with diffusers, one of 512 × 768 with ldm, and prints times, peak memory and the largest difference on
[0, 1] pixels. Exits with 1 if that is not below the tolerance. Needs the extra `test`.

    python scripts/full_size.py --family xl      on the CPU: 2 Euler steps in bfloat16, some ten minutes

Stable Diffusion XL: does it run in 24 GiB? Writes base and refiner as single checkpoint files, with the
tensors of the published ones (3.5G and 3.0G parameters, 13 GB), into --folder unless they are there, loads
both, takes one step of each at 1024 × 1024 pixels with guidance, and prints times and peak memory.
"""
import argparse
import gc
import gzip
import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import original
from oracles import SD, SD_VAE, UNETS
from tiny import FAMILIES, write_tokenizer

import ldm
from ldm.models import VAE, UNet, UNetConfig, VAEConfig

DTYPE     = {"cpu": torch.float32, "cuda": torch.float16}
TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
PROMPT    = "a photograph of an astronaut riding a horse"


def write(folder: Path) -> None:
    """The published configurations of Stable Diffusion 1.5, a tokenizer of single letters, random weights."""
    torch.manual_seed(0)
    text  = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                           num_attention_heads=12, hidden_act="quick_gelu", projection_dim=768,
                           architectures=["CLIPTextModel"], bos_token_id=0, eos_token_id=2, pad_token_id=1)
    files = {"unet/config.json": UNETS["SD 1.5"], "vae/config.json": SD_VAE,
             "text_encoder/config.json": text.to_dict(),
             "scheduler/scheduler_config.json": {**SD, **FAMILIES["SD 1.5"][0]}}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    write_tokenizer(folder / "tokenizer")
    modules = {"unet/diffusion_pytorch_model": UNet(UNetConfig.from_hf(UNETS["SD 1.5"])),
               "vae/diffusion_pytorch_model": VAE(VAEConfig.from_hf(SD_VAE)),
               "text_encoder/model": CLIPTextModel(text)}
    for name, module in modules.items():
        save_file(module.state_dict(), folder / f"{name}.safetensors", {"format": "pt"})
    (folder / "model_index.json").write_text(json.dumps({      # last, so that a folder with it is complete
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None], "feature_extractor": [None, None]}))


def report(what: str, start: float, device: str) -> None:
    seconds = time.perf_counter() - start
    peak    = (torch.cuda.max_memory_allocated() if device == "cuda" else
               1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"{what:36} {seconds:7.1f} s    peak memory so far {peak / 2**30:5.1f} GiB", flush=True)


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
    image = pipe(PROMPT, num_inference_steps=steps, generator=[torch.Generator().manual_seed(7)],
                 output_type="np").images
    report(f"diffusers: {steps} PNDM steps, 512 × 512", start, device)
    return image


def compare(folder: Path, device: str, steps: int) -> float:
    """The largest difference between the two pictures at 512 × 512."""
    first = ours(folder, device, DTYPE[device], steps)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    second = theirs(folder, device, DTYPE[device], steps)
    print(f"pixels: mean {second.mean():.3f}, standard deviation {second.std():.3f}")
    return float(np.abs(first - second).max())


def write_xl(folder: Path) -> None:
    """base.safetensors and refiner.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = json.loads(gzip.decompress((original.OUT / "tensors.json.gz").read_bytes()))["full"]
    for name in ("base", "refiner"):
        write_bfloat16(folder / f"{name}.part", tensors[f"SDXL {name}"])
        (folder / f"{name}.part").rename(folder / f"{name}.safetensors")        # so that a file is complete


def write_bfloat16(file: Path, shapes: dict[str, list[int]]) -> None:
    """Random weights in a safetensors file: 8 bytes that say how long a header is, the header, the numbers.

    By hand, one tensor at a time, as the library would want all of them in memory.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end   = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            few = original.weight(name, [min(size, 64) if i == 0 else size for i, size in enumerate(shape)])
            if shape:
                few = few[torch.arange(shape[0]) % 64]      # the first 64 rows again and again: quicker
            few.bfloat16().view(-1).view(torch.uint8).numpy().tofile(stream)


def xl(folder: Path) -> torch.Tensor:
    """One step of the base and one of the refiner at 1024 × 1024 pixels → latents (1, 4, 128, 128)."""
    pipes = []
    for name in ("base", "refiner"):
        start = time.perf_counter()
        pipes.append(ldm.load(folder / f"{name}.safetensors", device="cpu", dtype="bfloat16"))
        report(f"ldm: load {name}", start, "cpu")
    start = [time.perf_counter()]

    def step(i: int, *_: torch.Tensor) -> None:
        report(f"ldm: {('prompts, and a step of base', 'a step of refiner')[i - 1]}", start.pop(), "cpu")
        start.append(time.perf_counter())

    base, refiner = pipes
    return ldm.sample(PROMPT, base, refiner=refiner, handover=0.5, steps=2, spacing="trailing",
                      scheduler="euler", callback=step, output_type="latent")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "xl"), default="sd15")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of sd15; xl is for the CPU")
    parser.add_argument("--folder", type=Path, help="default: ldm-random-FAMILY among the temporary files")
    parser.add_argument("--steps", type=int, help="PNDM steps of sd15 (default: 2 on the CPU, 50 on a GPU)")
    args  = parser.parse_args()
    steps = args.steps or (50 if args.device == "cuda" else 2)
    args.folder = args.folder or Path(tempfile.gettempdir()) / f"ldm-random-{args.family}"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}, "
          f"{torch.get_num_threads()} threads")
    if args.family == "xl":
        if not (args.folder / "refiner.safetensors").exists():
            print(f"writing {args.folder}")
            write_xl(args.folder)
        latents = xl(args.folder)
        print(f"latents: mean {latents.mean():.3f}, standard deviation {latents.std():.3f}")
        return 0
    if not (args.folder / "model_index.json").exists():
        print(f"writing {args.folder}")
        write(args.folder)
    difference = compare(args.folder, args.device, steps)
    print(f"max difference {difference:.1e}, tolerance {TOLERANCE[args.device]:.0e}")
    wide = ours(args.folder, args.device, DTYPE[args.device], 1, width=768)
    ok   = (difference < TOLERANCE[args.device]
            and wide.shape == (1, 512, 768, 3) and bool(np.isfinite(wide).all()))
    print("ok" if ok else "FAIL")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
