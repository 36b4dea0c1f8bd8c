"""Makes every picture of README and docs again: python scripts/figures.py [NAME ...]

Each function below is one picture or table in docs/images or docs/generated, and has its name. Seeds are
fixed and nothing is picked.
"""
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "embedded")]

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw
from world import COLOURS

import ldm
from ldm import guidance, images, schedulers
from ldm.models import UNet, UNetConfig

IMAGES    = ROOT / "docs" / "images"
GENERATED = ROOT / "docs" / "generated"

# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes say the same without colour.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7",
                                                "#56B4E9", "#000000")
matplotlib.rcParams.update({
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK]),
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 10,
    "figure.constrained_layout.use": True, "svg.hashsalt": "ldm",
    "svg.fonttype": "none", "savefig.facecolor": "white",
})
PROMPTS = [
    "a red circle on a blue background",
    "a yellow star on a black background",
    "a large green heart",
    "a small purple square on a white background",
    "a red square above a blue circle",
    "a blue circle above a red square",
    "a white triangle to the left of a pink ring on a gray background",
    "an orange diamond at the top left on a white background",
]
MORE_PROMPTS = [
    "a red circle at the bottom right of a green background",
    "a white cross on a red background",
    "a large shiny blue ring on a yellow background",
    "a black heart on a pink background",
    "a green star on a purple background",
    "a striped orange square on a gray background",
    "a dotted blue heart on a white background",
    "a pink star below a gray ring on a black background",
    "a green triangle to the left of a yellow heart",
    "a yellow heart to the left of a green triangle",
    "a white circle to the right of a black square on a green background",
    "a large green circle and a small red diamond",
    "a purple cross under a white heart on a blue background",
    "two shapes: a red star and a blue diamond",
    "a small black star at the bottom left on a yellow background",
    "a yellow ring over an orange cross",
]


def shapes(pipe: ldm.Pipeline) -> None:
    """The sheet at the head of README: 24 prompts, the seeds 0 to 23, the pictures scaled to 128 pixels."""
    prompts  = PROMPTS + MORE_PROMPTS
    images.grid(small(ldm.sample(prompts, pipe, seed=0)), columns=8).save(IMAGES / "shapes.png")


def strip(pipe: ldm.Pipeline) -> None:
    """A run from noise to a picture: the state and the estimate of x₀ in every third of 25 steps."""
    sigmas   = pipe.schedule.sigmas(25, "trailing")
    states, guesses = [], []
    denoise  = bound(pipe, PROMPTS[0])

    def watched(x, sigma):
        x0 = denoise(x, sigma)
        states.append(x / (1 + sigma**2) ** 0.5)
        guesses.append(x0)
        return x0

    *_, x = schedulers.euler(watched, start(pipe, sigmas[0], 0), sigmas)
    rows  = [[*states[::3], x], [*guesses[::3], x]]
    sheet = images.grid(small(decoded(pipe, torch.cat([*rows[0], *rows[1]]))), columns=len(rows[0]))
    sheet.save(IMAGES / "strip.png")


def noise(pipe: ldm.Pipeline) -> None:
    """σ(t) of three schedules; the levels of six spacings."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    kinds = {"scaled linear": "-", "linear": "--", "cosine": ":"}
    for kind, dashes in kinds.items():
        left.plot(getattr(ldm.NoiseSchedule, kind.replace(" ", "_"))().table, dashes, label=kind)
    left.set(yscale="log", xlabel="time t", ylabel="σ, noise per unit of signal", ylim=(.005, 300))
    left.legend(frameon=False)
    spacings = ("leading", "trailing", "linspace", "karras", "exponential", "beta")
    for row, spacing in enumerate(spacings):
        sigmas = pipe.schedule.sigmas(10, spacing)[:-1]
        right.plot(sigmas, [row] * len(sigmas), "o", color=BLUE, markersize=5)
    right.set(xscale="log", xlabel="σ of the start of each step",
              yticks=range(len(spacings)), yticklabels=spacings)
    right.invert_yaxis()
    save(figure, "noise")


def ode(pipe: ldm.Pipeline) -> None:
    """The equation for two data points, −1 and +1: exact curves, and eight steps of Euler and Heun."""
    def denoise(x, sigma):
        return torch.tanh(x / sigma**2)
    fine   = list(np.geomspace(14.6, .02, 600))
    coarse = pipe.schedule.sigmas(8, "karras")
    starts = torch.tensor([-22., -9, -2.5, -.6, .6, 2.5, 9, 22], dtype=torch.float64) * 14.6 / 15
    exact  = torch.stack([starts, *schedulers.heun(denoise, starts, fine)])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, method in zip(axes, (schedulers.euler, schedulers.heun), strict=True):
        axis.plot(fine, exact.asinh(), color="0.75", linewidth=1)
        sigma = [.02 if s == 0 else s for s in coarse]
        axis.plot(sigma, torch.stack([starts, *method(denoise, starts, coarse)]).asinh(), "o-", color=BLUE,
                  markersize=3.5, linewidth=.6)
        ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
        axis.set(xscale="log", xlabel="σ (the last dot is σ = 0)", title=f"{method.__name__}, 8 steps",
                 yticks=[math.asinh(t) for t in ticks], yticklabels=ticks)
        axis.invert_xaxis()
    axes[0].set_ylabel("x")
    save(figure, "ode")


def parametrisations(pipe: ldm.Pipeline) -> None:
    """How an error of the network becomes one of x₀; what the network is asked for."""
    sigma = pipe.schedule.table
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    factors = {"epsilon": sigma, "v_prediction": sigma / np.sqrt(1 + sigma**2), "sample": np.ones_like(sigma)}
    for (name, factor), dashes in zip(factors.items(), ("-", "--", ":"), strict=True):
        left.plot(sigma, factor, dashes, label=name)
    left.set(xscale="log", yscale="log", xlabel="σ", ylabel="error of x₀ per error of F")
    left.legend(frameon=False)
    right.plot(sigma, 1 / np.sqrt(1 + sigma**2), "-", label="ε in v: √ᾱ")
    right.plot(sigma, -sigma / np.sqrt(1 + sigma**2), "--", label="x₀ in v: −√(1−ᾱ)")
    right.axhline(0, color="0.8", linewidth=.8)
    right.set(xscale="log", xlabel="σ", ylabel="share in v")
    right.legend(frameon=False)
    save(figure, "parametrisations")


def autoencoder(pipe: ldm.Pipeline) -> None:
    """A picture with ever finer things, its latents, its way back, five times the difference."""
    side    = pipe.defaults.height
    picture = Image.new("RGB", (4 * side, 4 * side), (40, 88, 206))
    draw    = ImageDraw.Draw(picture)
    u       = 4 * side / 128
    draw.ellipse([8 * u, 8 * u, 60 * u, 60 * u], fill=(212, 36, 44))
    draw.polygon([(96 * u, 8 * u), (122 * u, 58 * u), (70 * u, 58 * u)], fill=(250, 214, 44))
    for i, width in enumerate((6, 4, 3, 2, 1, .5)):
        draw.rectangle([(8 + 9 * i) * u, 70 * u, (8 + 9 * i + width) * u, 120 * u], fill=(247, 247, 245))
    for i, size in enumerate((14, 10, 7)):
        draw.text((70 * u, (70 + 18 * i) * u), "latent", fill=(247, 247, 245), font_size=size * u)
    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    pixels  = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe.encode(pixels)[0]
    back    = pipe.decode(latents).clamp(-1, 1)
    planes  = (latents[0] / (2.5 * latents.std()) / 2 + .5).clamp(0, 1)
    grey    = [Image.fromarray((plane.numpy() * 255).astype(np.uint8)).convert("RGB")
               .resize((side, side), Image.Resampling.NEAREST) for plane in planes]
    row     = [*images.to_pil(images.to_unit(pixels)), *grey, *images.to_pil(images.to_unit(back)),
               *images.to_pil(images.to_unit((5 * (back - pixels)).clamp(-1, 1)))]
    images.grid(row, columns=len(row)).save(IMAGES / "autoencoder.png")


def guidance_scales(pipe: ldm.Pipeline) -> None:
    """Six prompts, five scales."""
    scales  = (1, 2, 3, 5, 9)
    columns = [ldm.sample(PROMPTS[:6], pipe, guidance_scale=scale, seed=0) for scale in scales]
    rows    = [column[i] for i in range(6) for column in columns]
    images.grid(small(rows), columns=len(scales)).save(IMAGES / "guidance.png")


def attention(pipe: ldm.Pipeline) -> None:
    """Where each word of a prompt acts: cross-attention at 1/16 of the resolution, all steps and heads."""
    prompt = "a red square above a blue circle"
    words  = pipe.text.tokenizer.tokenize(prompt)
    cells  = pipe.defaults.height // 16
    shares = []

    def keep(module, arguments, output):
        x, context = arguments
        if x.shape[1] == cells**2:
            q, k = (y.unflatten(-1, (module.heads, -1)).transpose(1, 2)
                    for y in (module.to_q(x), module.to_k(context)))
            shares.append((q @ k.transpose(-1, -2) / q.shape[-1] ** .5).softmax(-1)[-1].mean(0))     # (L, S)

    hooks   = [module.register_forward_hook(keep) for name, module in pipe.unet.named_modules()
               if name.endswith("attn2")]
    picture = ldm.sample(prompt, pipe, seed=0)[0]
    for hook in hooks:
        hook.remove()
    mean    = torch.stack(shares).mean(0)
    figure, axes = plt.subplots(1, len(words) + 1, figsize=(1.35 * (len(words) + 1), 1.7))
    axes[0].imshow(picture)
    axes[0].set_title("picture", fontsize=9)
    for i, (axis, word) in enumerate(zip(axes[1:], words, strict=True), start=1):       # token 0 is the start
        axis.imshow(mean[:, i].reshape(cells, cells), cmap="cividis")
        axis.set_title(word.removesuffix("</w>"), fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(IMAGES / "attention.png", dpi=160)
    plt.close(figure)


def scheduler_strips(pipe: ldm.Pipeline) -> None:
    """Each deterministic method at 5, 10 and 25 steps: one prompt, one seed."""
    names  = ("euler", "heun", "lms", "pndm", "dpm", "dpmpp_2m")
    rows   = [ldm.sample(PROMPTS[6], pipe, scheduler=name, steps=steps, spacing="trailing", seed=6)[0]
              for steps in (5, 10, 25) for name in names]
    sheet  = images.grid(rows, columns=len(names))
    figure, axis = plt.subplots(figsize=(9, 9 * sheet.height / sheet.width + .3))
    axis.imshow(sheet)
    side   = pipe.defaults.width + images.GAP
    axis.set(xticks=[side * (i + .5) for i in range(len(names))], xticklabels=names,
             yticks=[side * (i + .5) for i in range(3)], yticklabels=["5 steps", "10", "25"])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.savefig(IMAGES / "schedulers.png", dpi=130)
    plt.close(figure)


def orders(pipe: ldm.Pipeline) -> None:
    """The error of each method on Gaussian data, where the exact end is known, by calls of the network."""
    width  = .5                                                          # of the data; D is linear in x then
    def exact(x, high, low):
        return x * math.sqrt((width**2 + low**2) / (width**2 + high**2))
    rows   = (("euler", schedulers.euler, {}), ("heun", schedulers.heun, {}), ("lms", schedulers.lms, {}),
              ("plms", schedulers.plms, {}), ("dpm_solver 2", schedulers.dpm_solver, {"order": 2}),
              ("dpm_solver_pp 2", schedulers.dpm_solver_pp, {"order": 2}))
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for (name, method, options), marker in zip(rows, "os^vDP", strict=True):
        counts, errors = [], []
        for steps in (8, 16, 32, 64, 128, 256):
            sigmas = list(np.geomspace(14.6, .1, steps + 1))
            used   = 0
            def denoise(x, sigma):
                nonlocal used
                used += 1
                return x * width**2 / (width**2 + sigma**2)
            *_, end = method(denoise, torch.tensor([10.], dtype=torch.float64), sigmas, **options)
            counts.append(used)
            errors.append(abs(float(end) - exact(10., 14.6, .1)))
        axis.plot(counts, errors, marker=marker, markersize=4, label=name)
    axis.set(xscale="log", yscale="log", xlabel="calls of the network",
             ylabel="error of the end, |x − exact|")
    axis.legend(frameon=False, fontsize=9)
    save(figure, "orders")


def img2img(pipe: ldm.Pipeline) -> None:
    """A picture, and another prompt at five strengths."""
    picture, = ldm.sample(PROMPTS[0], pipe, seed=0)
    others   = [ldm.img2img("a yellow star on a blue background", picture, pipe, strength=strength, seed=0)[0]
                for strength in (.3, .5, .7, .9, 1)]
    images.grid([picture, *others], columns=6).save(IMAGES / "img2img.png")


def inpaint(pipe: ldm.Pipeline) -> None:
    """A picture, a mask, and four seeds under it."""
    picture, = ldm.sample(PROMPTS[0], pipe, seed=0)
    side     = picture.width
    mask     = Image.new("L", picture.size, "black")
    ImageDraw.Draw(mask).rectangle([side // 4, side // 4, 3 * side // 4, 3 * side // 4], fill="white")
    hearts   = [ldm.inpaint("a white heart on a blue background", picture, mask, pipe, seed=seed)[0]
                for seed in range(4)]
    images.grid([picture, mask.convert("RGB"), *hearts], columns=6).save(IMAGES / "inpaint.png")


def tasks(pipe: ldm.Pipeline) -> None:
    """README's image to image at three strengths; its inpainting with three seeds."""
    picture, = ldm.sample(PROMPTS[0], pipe, seed=0)
    stars    = [ldm.img2img("a yellow star on a blue background", picture, pipe, strength=strength)[0]
                for strength in (.5, .7, .9)]
    side     = picture.width
    mask     = Image.new("L", picture.size, "black")
    ImageDraw.Draw(mask).ellipse([side // 4, side // 4, 3 * side // 4, 3 * side // 4], fill="white")
    prompt   = "a white heart on a blue background"
    hearts   = [ldm.inpaint(prompt, picture, mask, pipe, seed=seed)[0] for seed in range(3)]
    images.grid([picture, *stars, mask.convert("RGB"), *hearts], columns=8).save(IMAGES / "tasks.png")


def fine_tuning(pipe: ldm.Pipeline) -> None:
    """A shape the model does not know: six of 24 pictures of moons; six other prompts, before and after
    scripts/finetune.py has shown it the pictures."""
    prompts = [f"a {colour} moon on a {ground} background" for colour, ground in MOONS]
    prompts += ["a yellow moon above a red square", "a white moon at the top right on a blue background"]
    others  = [(a, b) for a in COLOURS for b in COLOURS if a != b and (a, b) not in MOONS]
    rng     = Random(0)
    with tempfile.TemporaryDirectory() as folder:
        pictures, out = Path(folder) / "pictures", Path(folder) / "out"
        pictures.mkdir()
        for i, (colour, ground) in enumerate(rng.sample(others, 24)):
            moon(colour, ground, pipe.defaults.width, rng).save(pictures / f"{i:02}.png")
            (pictures / f"{i:02}.txt").write_text(f"a {colour} moon on a {ground} background")
        subprocess.run([sys.executable, ROOT / "scripts/finetune.py", pictures, out, "--steps", "300",
                        "--offset", ".15"], check=True)
        shown  = [Image.open(pictures / f"{i:02}.png") for i in range(len(prompts))]
        drawn  = [ldm.sample(prompts, model, seed=0) for model in (pipe, ldm.load(out / "model"))]
        images.grid(small([*shown, *drawn[0], *drawn[1]]), len(prompts)).save(IMAGES / "fine_tuning.png")


MOONS = [("yellow", "blue"), ("white", "black"), ("red", "green"), ("purple", "white")]


def moon(colour: str, ground: str, side: int, rng: Random) -> Image.Image:
    """A crescent near the middle: a disc without another one."""
    disc, cut = (Image.new("L", (4 * side, 4 * side)) for _ in range(2))
    r    = 4 * side * rng.uniform(.15, .22)
    x, y = (4 * side * rng.uniform(.45, .55) for _ in range(2))
    ImageDraw.Draw(disc).ellipse([x - r, y - r, x + r, y + r], fill=255)
    ImageDraw.Draw(cut).ellipse([x - .4 * r, y - 1.05 * r, x + 1.5 * r, y + .85 * r], fill=255)
    mask = ImageChops.subtract(disc, cut).reduce(4)
    return Image.composite(Image.new("RGB", mask.size, COLOURS[colour]),
                           Image.new("RGB", mask.size, COLOURS[ground]), mask)


def unet_table(pipe: ldm.Pipeline) -> None:
    """Stable Diffusion 1.5's U-Net by level: shapes, shares of the parameters and of the multiplications."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        inputs = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
    shape = {}
    names = [f"down_blocks.{i}" for i in range(4)] + ["mid_block"] + [f"up_blocks.{i}" for i in range(4)]
    last  = {f"{name}.resnets.{len(unet.get_submodule(name).resnets) - 1}": name for name in names}
    for path, name in last.items():
        unet.get_submodule(path).register_forward_hook(
            lambda module, _, output, name=name: shape.update({name: tuple(output.shape[1:])}))
    counter = FlopCounterMode(display=False)
    with counter:
        unet(*inputs)
    work, total = {}, sum(p.numel() for p in unet.parameters())
    for path, operations in counter.get_flop_counts().items():
        work[path.removeprefix("UNet.")] = sum(operations.values())
    lines = ["| level | feature map | ResBlocks | transformers | parameters | multiplications |",
             "|---|---|---|---|---|---|"]
    for name in names:
        level   = unet.get_submodule(name)
        number  = sum(p.numel() for p in level.parameters())
        parts   = [f"{name}.{part}.{i}" for part in ("resnets", "attentions", "downsamplers", "upsamplers")
                   for i in range(len(getattr(level, part)))]
        share   = sum(work.get(part, 0) for part in parts) / work["Global"]
        c, h, w = shape[name]
        lines.append(f"| `{name}` | {c} × {h} × {w} | {len(level.resnets)} | {len(level.attentions)} "
                     f"| {number / total:.0%} | {share:.0%} |")
    GENERATED.mkdir(exist_ok=True)
    (GENERATED / "unet.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def start(pipe: ldm.Pipeline, sigma: float, seed: int) -> torch.Tensor:
    unit  = pipe.vae.config.downscale
    shape = 1, pipe.vae.config.latent_channels, pipe.defaults.height // unit, pipe.defaults.width // unit
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (1 + sigma**2) ** .5


def bound(pipe: ldm.Pipeline, prompt: str):
    """The guided denoiser of a prompt."""
    denoiser = ldm.Denoiser(pipe.unet, pipe.schedule, pipe.prediction)
    cond, uncond = pipe.text([prompt]), pipe.text([""])
    return guidance.classifier_free(denoiser, cond, uncond, pipe.defaults.guidance_scale)


def decoded(pipe: ldm.Pipeline, latents: torch.Tensor) -> list[Image.Image]:
    return images.to_pil(images.to_unit(pipe.decode(latents)))


def small(pictures: list[Image.Image]) -> list[Image.Image]:
    """Scaled to 128 pixels: a sheet of many should not weigh a megabyte."""
    return [picture.reduce(picture.width // 128) for picture in pictures]


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


FIGURES = {function.__name__: function for function in
           (shapes, strip, noise, ode, parametrisations, autoencoder, guidance_scales, attention,
            scheduler_strips, orders, img2img, inpaint, tasks, fine_tuning, unet_table)}

if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    pipeline = ldm.load(device="cpu")
    with torch.no_grad():
        for name in sys.argv[1:] or FIGURES:
            FIGURES[name](pipeline)
            print(name)
