"""Which scheduler for how many evaluations of the network? And what do fewer evaluations cost?

    python scripts/evaluations.py           measures on the embedded model, some minutes; writes JSON and plot
    python scripts/evaluations.py --plot    the plot alone, from the JSON

For each deterministic scheduler and number of evaluations, with as many steps as these suffice for: the RMS
error of the latents (whose standard deviation is about one) against the solution of the same equation from
the same start, by Heun's method in 500 steps. Then `fast.deep_cache` and `guidance.interval`: the same error,
the time, and how often the checker finds in a picture what its prompt asked for.

Writes docs/benchmarks/evaluations.json and docs/images/evaluations.png; the plot needs matplotlib.
"""
import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch
from torch import Tensor

import ldm
from ldm import fast, guidance, schedulers
from ldm.noise import seeded
from ldm.schedulers import SCHEDULERS

RESULT  = ROOT / "docs" / "benchmarks" / "evaluations.json"
PLOT    = ROOT / "docs" / "images" / "evaluations.png"
NUMBERS = (8, 15, 25, 50)
PROMPTS = ["a red circle on a blue background", "a yellow star on a black background",
           "a large green heart", "a small purple square on a white background",
           "a red square above a blue circle", "a blue circle above a red square",
           "a white triangle to the left of a pink ring on a gray background",
           "an orange diamond at the top left on a white background"]


def solver(pipe: ldm.Pipeline, name: str, spacing: str | None) -> Callable[[int], tuple[list[float], Any]]:
    """steps → σ's and the scheduler's function with its options bound, as a table's row has them."""
    row = SCHEDULERS[name]
    def at(steps: int) -> tuple[list[float], Any]:
        sigmas  = row.sigmas(pipe.schedule, steps, spacing=spacing, config=pipe.scheduler_config)
        options = {**row.options(pipe.schedule), **({"noise": lambda i: 0.0} if row.stochastic else {})}
        return sigmas, lambda denoise, x: row.function(denoise, x, sigmas, **options)
    return at


def evaluations(at: Callable[[int], tuple[list[float], Any]], steps: int) -> int:
    """How often a run calls the network."""
    calls = []
    def denoise(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return 0 * x
    for _ in at(steps)[1](denoise, torch.zeros(1)):
        pass
    return len(calls)


def end(states: Iterable[Tensor]) -> Tensor:
    *_, last = states
    return last


def deterministic() -> list[tuple[str, str | None]]:
    """Names and spacings. DDIM's η and Heun's churn are 0 here: they ask for noise and make nothing of it."""
    names = [name for name, row in SCHEDULERS.items() if not row.stochastic or name in ("ddim", "heun")]
    return [(name, None) for name in names] + [(name, "karras") for name in names if SCHEDULERS[name].ramps]


class Judge:
    """Runs from fixed starts, and what they should have come to."""

    def __init__(self, pipe: ldm.Pipeline):
        size = pipe.defaults.height, pipe.defaults.width
        self.pipe  = pipe
        shape      = pipe.vae.config.latent_channels, *(side // pipe.vae.config.downscale for side in size)
        self.noise = seeded(range(len(PROMPTS)), shape)(0)
        self.cond, self.uncond = (pipe.condition(texts, *size) for texts in (PROMPTS, [""] * len(PROMPTS)))
        self.solutions: dict[float, Tensor] = {}

    def denoise(self, unet: Any = None, interval: tuple[float, float] | None = None) -> Any:
        denoiser = ldm.Denoiser(unet or self.pipe.unet, self.pipe.schedule, self.pipe.prediction)
        scale    = self.pipe.defaults.guidance_scale
        guided   = guidance.classifier_free(denoiser, self.cond, self.uncond, scale)
        plain    = guidance.unguided(denoiser, self.cond)
        return guidance.interval(guided, plain, *interval) if interval else guided

    def start(self, sigma: float) -> Tensor:
        return self.noise * (1 + sigma**2) ** 0.5

    def error(self, sigmas: list[float], found: Tensor) -> float:
        """RMS of the difference to the solution at σ = 0, also of a run that ends a little above."""
        if sigmas[0] not in self.solutions:
            fine = self.pipe.schedule.sigmas(500, "karras", last="zero")
            fine = [sigma * sigmas[0] / fine[0] for sigma in fine]
            self.solutions[sigmas[0]] = end(schedulers.heun(self.denoise(), self.start(sigmas[0]), fine))
        return float((found - self.solutions[sigmas[0]]).square().mean().sqrt())


def errors(judge: Judge) -> list[dict[str, Any]]:
    results = []
    for name, spacing in deterministic():
        at, points = solver(judge.pipe, name, spacing), []
        for number in NUMBERS:
            steps = max((n for n in range(1, number + 1) if evaluations(at, n) <= number), default=0)
            if steps:
                sigmas, states = at(steps)
                found = end(states(judge.denoise(), judge.start(sigmas[0])))
                points.append({"evaluations": evaluations(at, steps), "of": number, "steps": steps,
                               "error": judge.error(sigmas, found)})
        results.append({"scheduler": name, "spacing": spacing or "its own", "points": points})
        print(f"{name:12s} {spacing or '':7s}", *(f"{p['of']:3d}: {p['error']:.4f}" for p in points),
              flush=True)
    return results


def savings(judge: Judge, count: int) -> list[dict[str, Any]]:
    """Deep features remembered, guidance in a part of the run: error, time, and the checker's verdict."""
    from evaluate import judge as verdict
    from evaluate import prompt_for, read, scenes_of
    scenes  = scenes_of("pair", count, seed=1_000_003)
    prompts = [prompt_for(scene) for scene in scenes]
    ways: list[tuple[str, dict[str, Any], Any]] = [("every call whole", {}, None)]
    ways += [(f"deep_cache(every={every}, layers={layers})", {}, (every, layers))
             for layers in range(judge.pipe.unet.config.layers + 1) for every in (2, 3, 5)]
    ways += [(f"guidance_interval=({low}, {high})", {"guidance_interval": (low, high)}, None)
             for low, high in ((0.3, 20), (0, 5), (0.3, 5))]
    sigmas, states = solver(judge.pipe, judge.pipe.defaults.scheduler, None)(judge.pipe.defaults.steps)
    results = []
    for name, options, cache in ways:
        unet  = fast.deep_cache(judge.pipe.unet, *cache) if cache else judge.pipe.unet
        found = end(states(judge.denoise(unet, options.get("guidance_interval")), judge.start(sigmas[0])))
        pipe, right, spent = replace(judge.pipe, unet=unet), 0, 0.0
        for i in range(0, count, 20):
            start  = time.perf_counter()
            images = ldm.sample(prompts[i:i + 20], pipe, seed=i, progress=False, **options)
            spent += time.perf_counter() - start
            right += sum(verdict(scene, read(image))["both and relation"]
                         for scene, image in zip(scenes[i:i + 20], images, strict=True))
        results.append({"way": name, "error": judge.error(sigmas, found), "seconds": spent / count,
                        "right": right, "of": count})
        print(f"{name:34s} error {results[-1]['error']:.4f}  {spent / count:.3f} s a picture  "
              f"{right} of {count} right", flush=True)
    return results


def plot(result: dict[str, Any]) -> None:
    """Colours of Okabe & Ito 2008, which all readers can tell apart, and a marker for each scheduler."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
    names   = list(dict.fromkeys(one["scheduler"] for one in result["errors"]))
    panels  = list(dict.fromkeys(one["spacing"] for one in result["errors"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4.4), sharey=True, squeeze=False)
    for axis, spacing in zip(axes[0], panels, strict=True):
        for one in result["errors"]:
            if one["spacing"] == spacing:
                i = names.index(one["scheduler"])
                axis.plot([p["evaluations"] for p in one["points"]], [p["error"] for p in one["points"]],
                          marker="osD^v<>pX*hd"[i % 12], color=colours[i % 8], linestyle=["-", "--"][i // 8],
                          label=one["scheduler"], markersize=5, linewidth=1.4)
        axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", title=f"spacing: {spacing}")
        axis.set_xticks(NUMBERS, map(str, NUMBERS))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("RMS error of the latents")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=150)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--model", help="a folder; default: the embedded model")
    parser.add_argument("--count", type=int, default=100, help="prompts for the checker")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if not args.plot:
        torch.set_num_threads(args.threads)
        judge  = Judge(ldm.load(args.model, device="cpu"))
        result = {"model": judge.pipe.name, "guidance_scale": judge.pipe.defaults.guidance_scale,
                  "prompts": PROMPTS, "errors": errors(judge), "savings": savings(judge, args.count)}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    plot(json.loads(RESULT.read_text("utf-8")))


if __name__ == "__main__":
    main()
