"""The parity matrix: every component against code that we did not write, on the CPU, in about a minute.

    python scripts/parity.py

Prints component, case, largest difference and tolerance, and exits with 1 if one is not within its tolerance.
Differences are relative to the largest number of the oracle (at least 1); those of pictures are on [0, 1].
The oracles are diffusers and transformers; needs the extra `test`. The tests hold these comparisons and more.
"""
import math
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")                       # nothing here needs the network
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import diffusers
import numpy as np
import oracles
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_schedulers import errors
from transformers import CLIPTextModel, CLIPTokenizer

import ldm
from ldm import NoiseSchedule
from ldm.models import VAE, TinyVAE, UNet, UNetConfig, VAEConfig
from ldm.schedulers import SCHEDULERS

DTYPES = {"float64": (torch.float64, 1e-10), "float32": (torch.float32, 1e-5)}
failed = 0


def report(component: str, case: str, difference: float, tolerance: float, note: str = "") -> None:
    """One line of the matrix."""
    global failed
    ok = difference <= tolerance                                   # False for nan
    failed += not ok
    verdict = "ok" if ok else "FAIL"
    print(f"{component:17s} {case:42s} {difference:9.1e} {tolerance:9.0e}  {verdict:4s}  {note}", flush=True)


def networks() -> None:
    def unlike(ours: torch.nn.Module, theirs: torch.nn.Module) -> int:
        ours, theirs = ({(name, tensor.shape) for name, tensor in module.state_dict().items()}
                        for module in (ours, theirs))
        return len(ours ^ theirs)
    with torch.device("meta"):
        for family, config in oracles.UNETS.items():
            theirs = diffusers.UNet2DConditionModel.from_config(config)
            report("U-Net names", f"{family}, full size", unlike(UNet(UNetConfig.from_hf(config)), theirs), 0,
                   f"{sum(p.numel() for p in theirs.parameters()) / 1e6:,.0f}M parameters")
        theirs = diffusers.AutoencoderKL.from_config(oracles.SD_VAE)
        report("autoencoder names", "SD, full size",
               unlike(VAE(VAEConfig.from_hf(oracles.SD_VAE)), theirs), 0)
        report("autoencoder names", "TAESD, full size", unlike(TinyVAE(), diffusers.AutoencoderTiny()), 0)
    for dtype, (kind, tolerance) in DTYPES.items():
        for family in oracles.TINY_UNETS:
            worst = np.max([oracles.unet_difference(family, kind, size) for size in ((8, 16), (9, 13))])
            report("U-Net", f"{family}, {dtype}, even and odd sizes", worst, tolerance)
    for dtype, (kind, tolerance) in DTYPES.items():
        for family in oracles.TINY_VAES:
            found = oracles.vae_differences(family, kind, (16, 40))
            report("autoencoder", f"{family}, {dtype}", np.max([*found.values()]), tolerance)
        found = oracles.taesd_differences(oracles.TINY_TAESD, kind, (16, 40))
        report("autoencoder", f"TAESD, {dtype}", np.max([*found.values()]), tolerance)


def noise_schedules() -> None:
    kinds = {"SD": oracles.SD, "linear": {}, "cosine": {"beta_schedule": "squaredcos_cap_v2"},
             "trained": {"trained_betas": np.geomspace(1e-4, 0.03, 1000).tolist()}}
    kinds |= {f"{kind}, zero terminal SNR": {**kinds[kind], "rescale_betas_zero_snr": True}
              for kind in ("SD", "linear", "cosine")}
    for kind, config in kinds.items():
        theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double().numpy()
        ours   = 1 / (1 + NoiseSchedule.from_hf(config).table ** 2)
        report("noise schedule", f"ᾱ, {kind}", np.abs(ours - theirs).max(), 1e-6, "float32 there")
    for ramp in oracles.RAMPS:
        config = oracles.config_of(ramp)
        theirs = oracles.their_scheduler(SCHEDULERS["dpmpp_2m"], config)
        worst  = 0.0
        for steps in oracles.STEPS:
            theirs.set_timesteps(steps)
            ours  = SCHEDULERS["dpmpp_2m"].sigmas(oracles.SD_SCHEDULE, steps, config=config)
            worst = np.maximum(worst, np.abs(np.array(ours) - theirs.sigmas.double().numpy()).max() / ours[0])
        report("noise schedule", f"σ's, {ramp}", worst, 1e-6)


def all_schedulers() -> None:
    """The worst over the step counts; where ours differs on purpose, a letter says why."""
    letters: dict[str, str] = {}
    for name, row in SCHEDULERS.items():
        for spacing in oracles.SPACINGS + oracles.RAMPS * row.ramps:
            kept, left_out = [], {}
            for steps in oracles.STEPS:
                if reason := oracles.differs_on_purpose(name, spacing, steps):
                    letter = letters.setdefault(reason, "abcdefgh"[len(letters)])
                    left_out.setdefault(letter, []).append(str(steps))
                else:
                    kept.append(steps)
            note = "  ".join(f"without {', '.join(steps)} steps ({letter})"
                             for letter, steps in left_out.items())
            if not kept:
                print(f"{'scheduler':17s} {f'{name}, {spacing}':42s} {'-':>9s} {'-':>9s}        {note}")
                continue
            for prediction in oracles.PREDICTIONS:
                found = [oracles.compare(name, spacing, prediction, steps) for steps in kept]
                difference, times = oracles.tolerances(name, spacing, prediction)
                same = all(one.calls[0] == one.calls[1] and one.times <= times for one in found)
                report("scheduler", f"{name}, {spacing}, {prediction}",
                       np.max([one.difference for one in found]) if same else math.nan, difference, note)
    print("\nNot compared, and why:")
    for reason, letter in letters.items():
        print(f"  ({letter}) {reason}")
    print("diffusers' PNDM always gets ε, and Euler ancestral does for x₀: see test_pndm_takes_epsilon.\n")


def from_the_middle() -> None:
    """Image to image on Gaussian data: 20 steps, the error against the exact solution."""
    print(f"{'from the middle':17s} {'error at strength 1, .5, .25':42s} {'ours':>28s}   {'diffusers':>28s}")
    for name, row in SCHEDULERS.items():
        if not row.stochastic or name == "ddim":
            found = [errors(name, oracles.config_of(), 20, skip=skip) for skip in (0, 10, 15)]
            ours, theirs = (" → ".join(f"{error:8.2g}" for error in column)
                            for column in zip(*found, strict=True))
            print(f"{'':17s} {name:42s} {ours:>28s}   {theirs:>28s}")
    print()


@torch.no_grad()
def text_encoder(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model     = CLIPTextModel.from_pretrained(folder / "text_encoder")
    prompts   = ["a red cat", "", "x" * 70]
    tokens    = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    theirs    = model(tokens).last_hidden_state
    report("text encoder", "file of the installed transformers",
           oracles.relative(ldm.load(folder, device="cpu").text(prompts).context, theirs), 1e-6)
    old  = Path(shutil.copytree(folder, folder.with_name("old")))
    file = old / "text_encoder/model.safetensors"
    save_file({f"text_model.{name.removeprefix('text_model.')}": tensor.clone()
               for name, tensor in load_file(file).items()}, file)
    report("text encoder", "file with the old names, text_model.…",
           oracles.relative(ldm.load(old, device="cpu").text(prompts).context, theirs), 1e-6)


def pictures(folder: Path) -> None:
    for name in SCHEDULERS:
        report("ldm.sample", f"{name}, 7 steps, two seeds", tiny.picture_difference(folder, name), 1e-4)
    v_model = tiny.write(folder.with_name("v"), prediction="v_prediction")
    for name in ("ddim", "euler", "dpmpp_2m"):
        report("ldm.sample", f"{name}, v-prediction", tiny.picture_difference(v_model, name), 1e-4)


def main() -> int:
    torch.set_num_threads(1)                                       # everything is tiny
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(f"{'component':17s} {'case':42s} {'max diff.':>9s} {'tolerance':>9s}")
    networks()
    noise_schedules()
    all_schedulers()
    from_the_middle()
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny.write(Path(temporary) / "tiny")
        text_encoder(folder)
        pictures(folder)
    print(f"\n{failed} outside of their tolerance" if failed else "\nall within their tolerances")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
