"""Trains the embedded model, or stages of it: python scripts/embedded/train.py --out FOLDER [STAGE ...]

    vae     the autoencoder                             → FOLDER/vae, sheet vae.png
    text    tokenizer and text encoder                  → FOLDER/tokenizer, FOLDER/text_encoder
    half    the U-Net's inner levels, at half the size  → FOLDER/half.pt, sheet half.png
    unet    the U-Net                                   → FOLDER/unet.pt, sheet unet.png
    polish  the decoder again, on the U-Net's scenes    → FOLDER/vae
    export  float16 in Hugging Face layout              → FOLDER/model

Start it again after a kill and it goes on from the last checkpoint in FOLDER. On several GPUs:

    torchrun --nproc-per-node 4 scripts/embedded/train.py --out FOLDER

To train a model on, the one in the package for example, instead of beginning from nothing:

    python scripts/embedded/train.py --out FOLDER --from ldm/assets/shapes --rate 5e-4 --noisy 0 --clear .5 \\
        --seed 1

The model in the package was exported with --assets ldm/assets/shapes, which replaces it.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # spinning threads starve each other

import torch
import train_text
import train_unet
import train_vae
from common import WORLD, join, once
from export import export, load_vae
from grow import grow, widen
from world import MORE_SHAPES

import ldm
from ldm.models.unet import UNet, UNetConfig

STAGES = ("vae", "text", "half", "unet", "polish", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; all by default")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and sheets")
    parser.add_argument("--assets", type=Path, help="where to export to; default: FOLDER/model")
    parser.add_argument("--size", type=int, default=256, help="pixels of a picture's side")
    parser.add_argument("--scenes", type=int, default=24000, help="training scenes for the U-Net and polish")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--text-steps", type=int, default=1300)
    parser.add_argument("--half-steps", type=int, default=5000)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--polish-steps", type=int, default=1000)
    parser.add_argument("--from", dest="start", type=Path, help="a model's folder: unet, export by default")
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step of the U-Net, each process")
    parser.add_argument("--rate", type=float, default=1e-3, help="the U-Net's highest learning rate")
    parser.add_argument("--noisy", type=float, default=.3, metavar="SHARE",
                        help="of the U-Net's timesteps, from the noisiest fifth alone: .3 until layouts are\n"
                             "learned, then 0, for outlines are decided at less noise")
    parser.add_argument("--clear", type=float, default=0, metavar="SHARE",
                        help="of all its timesteps, from the clearest two fifths alone: .5 when the layouts\n"
                             "are learned (--noisy is a share of the others)")
    parser.add_argument("--seed", type=int, default=0, help="of the U-Net's samples; a new one to train on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.device, args.assets = join(args.device), args.assets or args.out / "model"
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        parser.error(f"no stage named {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")

    if args.start:
        started = ldm.load(args.start, device="cpu", dtype="float32")
        once(lambda: take_over(started, args.start, args.out))

    for stage in args.stages or (STAGES if not args.start else ("unet", "export")):
        if stage == "vae":
            train_vae.train(args.out, args.vae_steps, args.size, args.device)
        elif stage == "text":
            train_text.train(args.out, args.text_steps, args.device)
        elif stage in ("half", "unet"):
            vae, path = load_vae(args.out / "vae").to(args.device), args.out / f"{stage}.pt"
            torch.manual_seed(0)
            unet, steps, size = UNet(train_unet.INNER), args.half_steps, args.size // 2
            if stage == "unet":
                unet = (started.unet.requires_grad_(True) if args.start else
                        widen(grow(train_unet.averaged(args.out / "half.pt", unet))))
                steps, size = args.unet_steps, args.size
                once(partial(write_recipe, args, unet.config))
            train_unet.train(path, unet, vae, steps, args.scenes, size, args.batch, args.rate,
                             args.noisy, args.clear, args.seed, args.device)
        elif stage == "polish":
            train_vae.polish(args.out, args.polish_steps, args.scenes, args.size, args.device)
        else:
            once(lambda: export_model(args))


def take_over(model: ldm.Pipeline, name: Path, out: Path) -> None:
    """Puts autoencoder, tokenizer and text encoder of a model, in float32, where the stages look for them."""
    marker = out / "from.txt"
    if (out / "vae").exists() or (out / "unet.pt").exists():
        if marker.exists() and marker.read_text() == str(name):             # an earlier start has done it
            return
        sys.exit(f"{out} holds another run, which would be gone on with: give a new folder to train {name}.")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(str(name))
    shutil.rmtree(out / "start", ignore_errors=True)
    model.save(out / "start")
    for part in ("tokenizer", "text_encoder", "vae"):
        shutil.rmtree(out / part, ignore_errors=True)
        (out / "start" / part).rename(out / part)
    shutil.rmtree(out / "start")


def export_model(args: argparse.Namespace) -> None:
    saved  = torch.load(args.out / "unet.pt", weights_only=True, map_location="cpu")
    recipe = json.loads((args.out / "unet.json").read_text())
    unet   = UNet(UNetConfig.from_hf(recipe["unet"]))
    unet.load_state_dict(saved["ema"])
    export(args.out, args.assets, unet, recipe["size"], card(args.out, recipe, saved, unet.config))
    size = sum(file.stat().st_size for file in args.assets.rglob("*") if file.is_file())
    print(f"wrote {args.assets}: {size / 1e6:.1f} MB")


def write_recipe(args: argparse.Namespace, config: UNetConfig) -> None:
    """What the U-Net is and how it is trained, for the export and the card: unet.json."""
    commit  = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent)
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else \
        f"{args.threads * WORLD} threads of a {platform.machine()} CPU shared with other work"
    recipe = {"size": args.size, "scenes": args.scenes, "batch": args.batch * WORLD, "rate": args.rate,
              "noisy": args.noisy, "clear": args.clear, "machine": machine, "date": time.strftime("%Y-%m-%d"),
              "arithmetic": "bfloat16 (autocast)" if train_unet.in_bfloat16(args.device) else "float32",
              "commit": commit.stdout.strip() or "not yet committed", "torch": torch.__version__,
              "unet": config.to_hf()}
    (args.out / "unet.json").write_text(json.dumps(recipe, indent=1) + "\n")


def card(out: Path, recipe: dict[str, Any], unet: dict[str, Any], config: UNetConfig) -> str:
    """The model card: what the model is and how these very weights came to be.

    Takes in what is written by hand in notes.md (how this run differed from the scripts) and measured.md (the
    table of evaluate.py) of the output folder.
    """
    minutes = {"U-Net": unet["seconds"] / 60}
    steps = {"U-Net": unet["step"]}
    files = {"U-Net, inner levels, at half the size": "half.pt", "autoencoder": "vae.pt",
             "decoder, alone": "polish.pt", "text encoder": "text.pt"}
    for name, file in files.items():
        if (out / file).exists():
            saved = torch.load(out / file, weights_only=True, map_location="cpu")
            minutes[name], steps[name] = saved["seconds"] / 60, saved["step"]
    rows = "\n".join(f"| {name} | {steps[name]} | {minutes[name]:.0f} |" for name in minutes)
    def written(name: str, otherwise: str) -> str:
        return (out / name).read_text() if (out / name).exists() else otherwise
    return CARD.format(**recipe | {"unet": config}, vae=load_vae(out / "vae").config, rows=rows,
                       dropped=train_unet.DROPPED, visible=train_unet.VISIBLE, offset=train_unet.OFFSET,
                       more=", ".join(MORE_SHAPES),
                       text=f"{train_text.LAYERS} layers of {train_text.WIDTH}, {train_text.LENGTH} tokens",
                       notes=written("notes.md", ""), measured=written("measured.md", "Not measured yet.\n"))


CARD = """---
license: apache-2.0
---
# shapes: a small text-to-image model

A latent diffusion model of one or two coloured shapes on a background, {size}x{size} pixels. It was
trained from scratch by `scripts/embedded/train.py` on pictures and captions that `scripts/embedded/world.py`
draws and writes: eight shapes (and seven that nothing measures), ten colours, three sizes, four textures,
nine places, and the relations above, below, left and right. It knows nothing else.

## Parts
- autoencoder: `{vae}`
- U-Net (v-prediction, trailing spacing): `{unet}`
- text encoder (CLIP): {text}; trained first to say what a caption describes, then frozen

## Training
{date}, on {machine}, torch {torch}, commit {commit}; {scenes} scenes, all seeds fixed in the scripts.

| stage | steps | minutes |
|---|---|---|
{rows}

U-Net: in {arithmetic}, batches of {batch}, AdamW at {rate:g}, an exponential moving average of the
weights (these are the ones here); {clear:.0%} of the timesteps from the clearest two fifths alone and
{noisy:.0%} of the others from the noisiest fifth alone; {dropped:.0%} of the captions empty; the noise
with an offset of {offset:g} (`training.offset_noise`). Scenes of a single thing are drawn more often,
below timestep {visible} those with something small or pointed, too (`emphasis`). Half of the scenes may have
other shapes than the eight ({more}): for variety, nothing here measures how well they are drawn.
{notes}
## Measured
{measured}
## Limits
Colours and shapes outside the lists, more than two objects, and scenes of any other kind. The combinations in
`HELD_OUT` of `world.py` were never drawn in training.
"""


if __name__ == "__main__":
    main()
