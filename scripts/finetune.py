"""Fine-tunes a model on pictures with captions: python scripts/finetune.py PICTURES OUT [--model NAME]

PICTURES holds pictures (PNG, JPEG, WebP), and beside each a text file of the same name with its caption:
moon-1.png, moon-1.txt. Pictures are scaled and cropped to the model's size. Only the U-Net learns; the text
encoder and the autoencoder stay as they are. OUT/model becomes a folder in Hugging Face layout, for
`ldm.load("OUT/model")`; OUT/training.pt is a checkpoint: start the command again after a kill, or with more
steps, and it goes on from there.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent / "embedded")]

import torch
from common import draw, join, once, replacing, run
from torch import Tensor

import ldm
from ldm import images, training

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


def read_folder(folder: Path) -> list[tuple[Path, str]]:
    """Each picture with its caption. FileNotFoundError: no pictures, or one without a caption."""
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not pictures:
        raise FileNotFoundError(f"{folder} has no pictures ({', '.join(sorted(ENDINGS))})")
    if missing := [path.name for path in pictures if not path.with_suffix(".txt").is_file()]:
        raise FileNotFoundError(f"{len(missing)} pictures in {folder} have no caption beside them, such as "
                                f"{missing[0]}: write it to {Path(missing[0]).with_suffix('.txt')}")
    return [(path, path.with_suffix(".txt").read_text("utf-8").strip()) for path in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="folder, file or hub id; default: the embedded model")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--offset", type=float, default=0, help=(
        "of the noise (training.offset_noise), as in the training of the model: .15 for the embedded one"))
    parser.add_argument("--dropped", type=float, default=.1, help="share of captions left empty")
    args = parser.parse_args()

    device = join("cuda" if torch.cuda.is_available() else "cpu")
    pipe   = ldm.load(args.model, device=device, dtype="float32")
    size   = pipe.defaults.height, pipe.defaults.width
    pairs  = read_folder(args.pictures)
    if getattr(pipe.unet.config, "vector_dim", None):
        sys.exit("This script teaches U-Nets that read a text only; those of Stable Diffusion XL read more.")
    with torch.no_grad():
        latents = [pipe.encode(images.fit(images.read(path), *size, pipe.vae.config.downscale) * 2 - 1)
                   for path, _ in pairs]                                                          # mean, std
        texts   = torch.cat([pipe.condition([caption], *size).context for _, caption in pairs])
        empty   = pipe.condition([""], *size).context
    mean, std = (torch.cat(parts) for parts in zip(*latents, strict=True))
    sigmas    = torch.tensor(pipe.schedule.table, dtype=torch.float32, device=pipe.device)

    unet      = pipe.unet.requires_grad_(True).train()
    ema       = training.EMA(unet, .999)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=args.rate, weight_decay=.01)

    def step(i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(draw(i))
        def normal() -> Tensor:
            return torch.randn(args.batch, *mean.shape[1:], generator=generator).to(mean)
        chosen = torch.randint(len(pairs), (args.batch,), generator=generator)
        x0     = mean[chosen] + std[chosen] * normal()
        text   = training.drop_captions(texts[chosen], empty, args.dropped, generator)
        t      = training.sample_timesteps(args.batch, len(sigmas), generator=generator).to(mean.device)
        noise  = training.offset_noise(normal(), args.offset, generator)
        return {"loss": training.denoising_loss(unet, x0, noise, t, sigmas[t], text, pipe.prediction)}

    state = {"unet": unet, "ema": ema, "optimiser": optimiser}
    run(args.out / "training.pt", state, args.steps, args.rate, step, lambda i: "", every=50)
    ema.swap()
    once(lambda: write(replace(pipe, unet=unet.eval()), args.out / "model"))


def write(pipe: ldm.Pipeline, folder: Path) -> None:
    """Saves the model, in the place of one of an earlier run."""
    with replacing(folder) as building:
        pipe.save(building)


if __name__ == "__main__":
    main()
