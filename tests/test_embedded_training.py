"""The training loop of the scripts: killed and started again, in several processes, and to fine-tune."""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image, ImageColor

import ldm
from ldm.models import UNet, UNetConfig

sys.path += [str(Path(__file__).resolve().parents[1] / "scripts" / folder) for folder in ("embedded", "")]

import common
import finetune as fine_tuning
import train_unet
import train_vae
import world
from export import load_vae
from grow import grow, widen
from world import Scene, Thing

EMBEDDED = Path(train_unet.__file__).parent

# Trains a line on samples that the step's number decides; the arguments: checkpoint, steps, samples a step.
PROGRAM = """
import sys
import time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from common import draw, join, once, run
from ldm.training import EMA

join("cpu")
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
ema = EMA(model, .9)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
count = int(sys.argv[4])

def step(i):
    seeds = range(draw(i) * count, (draw(i) + 1) * count)
    x = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

run(Path(sys.argv[2]), {"model": model, "ema": ema, "optimiser": optimiser}, int(sys.argv[3]), 1e-2, step,
    lambda i: time.sleep(.5) or "reported", every=2)
print("found", torch.load(sys.argv[2], weights_only=True)["step"], flush=True)
once(lambda: Path(sys.argv[2]).with_suffix(".done").write_text("x"))
"""


def train(path: Path, steps: int, samples: int, *launcher: str) -> str:
    program = path.with_name("program.py")
    program.write_text(PROGRAM)
    command = [sys.executable, *launcher, program, EMBEDDED, path, str(steps), str(samples)]
    return subprocess.run(command, check=True, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path):
    train(tmp_path / "whole.pt", 6, 4)
    # The learning rate depends on the number of steps, so it is a run of six that is cut off.
    killed = PROGRAM.replace("def step(i):", "def step(i):\n    if i == 5: raise SystemExit(9)")
    (tmp_path / "killed.py").write_text(killed)
    command = [sys.executable, tmp_path / "killed.py", EMBEDDED, tmp_path / "parts.pt", "6", "4"]
    assert subprocess.run(command, capture_output=True).returncode == 9
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 4
    train(tmp_path / "parts.pt", 6, 4)
    whole, parts = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(parts[part][name], value)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    common.save({"step": 1}, path)
    def cut_off(state, file):
        Path(file).write_bytes(b"PK half of")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        common.save({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_two_processes_take_one_step_on_all_their_samples(tmp_path):
    train(tmp_path / "one.pt", 4, 8)
    printed = train(tmp_path / "two.pt", 4, 4, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                    "--standalone")
    assert printed.count("reported") == 2           # of steps 2 and 4, by the first process only
    assert printed.count("found 4") == 2            # the other one does not go on with step 2
    one, two = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("one.pt", "two.pt"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)


def test_the_unet_begins_with_what_it_learned_at_half_the_size_and_its_average_is_exported(tmp_path):
    pipe = ldm.load(device="cpu")
    pipe.save(tmp_path)                                  # autoencoder, text encoder and tokenizer, in float32
    command = [sys.executable, EMBEDDED / "train.py", "half", "unet", "export", "--out", tmp_path,
               "--size", "128", "--scenes", "4", "--half-steps", "2", "--unet-steps", "1",
               "--device", "cpu", "--threads", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for size in (64, 128):
        latents = torch.load(tmp_path / f"latents_{size}.pt", weights_only=True)
        assert latents.shape == (4, 4, size // 8, size // 8)
    half, unet = (torch.load(tmp_path / name, weights_only=True) for name in ("half.pt", "unet.pt"))
    assert (half["step"], unet["step"]) == (2, 1)
    def furthest(weights: str) -> float:
        torch.manual_seed(0)
        inner = UNet(train_unet.INNER)
        inner.load_state_dict(half[weights])
        begun = widen(grow(inner)).state_dict()
        assert begun.keys() == unet["unet"].keys()
        return max((unet["unet"][name] - tensor).abs().max() for name, tensor in begun.items())
    assert furthest("ema") < 1.1e-5 < furthest("unet")  # one step, at a hundredth of the rate of 1e-3
    exported = ldm.load(tmp_path / "model", device="cpu", dtype="float32")
    for name, tensor in exported.unet.state_dict().items():
        torch.testing.assert_close(tensor, unet["ema"][name].half().float(), rtol=0, atol=0)
    assert (exported.prediction, exported.defaults.height) == ("v_prediction", 128)
    card = (tmp_path / "model/README.md").read_text()
    for words in ("128x128 pixels", "4 scenes", "| U-Net | 1 |", "of 32, AdamW at 0.001", "30% of the"):
        assert words in card


def test_training_a_finished_model_on_begins_with_its_weights_and_other_samples(tmp_path):
    pipe = ldm.load(device="cpu")
    pipe.save(tmp_path / "model")
    def trained(seed: int) -> dict:
        out = tmp_path / str(seed)
        command = [sys.executable, EMBEDDED / "train.py", "unet", "--out", out, "--from", tmp_path / "model",
                   "--size", "64", "--scenes", "4", "--unet-steps", "1", "--rate", "1e-3"]
        command += ["--seed", str(seed), "--device", "cpu", "--threads", "1"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return torch.load(out / "unet.pt", weights_only=True)["unet"]
    first, other = trained(0), trained(1)
    for name, tensor in pipe.unet.state_dict().items():  # one step, at a hundredth of the rate
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=2e-5)
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    command = [sys.executable, EMBEDDED / "train.py", "--out", tmp_path / "0", "--from", tmp_path / "1"]
    shutil.copytree(tmp_path / "model", tmp_path / "1", dirs_exist_ok=True)
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "holds another run, which would be gone on with: give a new folder" in run.stderr


def test_a_grown_unet_begins_as_the_small_one_at_twice_the_size():
    torch.manual_seed(0)
    small = UNet(UNetConfig(channels=(16, 24, 32), layers=2, depth=(1, 1, 2), mid_depth=2, heads=(2, 2, 4),
                            groups=4, context_dim=12))
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=.1)
    for conv in (small.conv_in, small.conv_out):        # else they see twice as far in the small one
        off = torch.ones(3, 3)
        off[1, 1] = 0
        conv.weight.data.mul_(1 - off)
    large = grow(small)
    assert large.config.channels == (16, 16, 24, 32)
    assert large.config.depth == (0, 1, 1, 2)
    x, t, text = torch.randn(3, 4, 8, 8), torch.tensor([3., 500., 999.]), torch.randn(3, 5, 12)
    with torch.no_grad():
        before = small(x, t, text).repeat_interleave(2, 2).repeat_interleave(2, 3)
        after  = large(x.repeat_interleave(2, 2).repeat_interleave(2, 3), t, text)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * before.std().item())


def test_a_widened_unet_begins_as_the_narrow_one_and_its_copies_part():
    torch.manual_seed(0)
    narrow = UNet(UNetConfig(channels=(16, 16, 32), layers=2, depth=(0, 1, 1), heads=(2, 2, 4), groups=4,
                             context_dim=12))
    for parameter in narrow.parameters():
        torch.nn.init.normal_(parameter, std=.1)
    wide = widen(narrow)
    assert wide.config.channels == (32, 16, 32)
    x, t, text = torch.randn(3, 4, 8, 8), torch.tensor([3., 500., 999.]), torch.randn(3, 5, 12)
    def difference() -> float:
        with torch.no_grad():
            before = narrow(x, t, text)
            return ((wide(x, t, text) - before).std() / before.std()).item()
    assert .001 < difference() < .3
    # The norms that see channels without copies beside channels with them: nothing else may differ.
    for unet in (narrow, wide):
        for block in (unet.up_blocks[-2].resnets[-1], unet.up_blocks[-1].resnets[0]):
            torch.nn.init.zeros_(block.conv2.weight)
    assert difference() < 1e-5
    wide(x, t, text).square().mean().backward()
    for block in (wide.down_blocks[0].resnets[0], wide.up_blocks[-1].resnets[1]):
        one, other = block.conv1.weight.grad.flatten(1).unflatten(0, (-1, 2)).unbind(1)   # of the two copies
        assert ((one - other).norm(dim=1) > .1 * one.norm(dim=1)).all()


def finetune(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, EMBEDDED.parent / "finetune.py", *map(str, arguments)],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_fine_tuning_on_a_folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (160, 130), (212, 36, 44)).save(pictures / "a.png")
    run = finetune(pictures, tmp_path / "out")
    assert run.returncode != 0
    assert "no caption beside them, such as a.png: write it to a.txt" in run.stderr
    (pictures / "a.txt").write_text("a red wall\n")
    run = finetune(pictures, tmp_path / "out", "--steps", 3, "--batch", 2, "--rate", 1e-3)
    assert run.returncode == 0, run.stderr
    before, after = ldm.load(device="cpu"), ldm.load(tmp_path / "out/model", device="cpu")
    changed = {name for name, tensor in after.unet.state_dict().items()
               if not torch.equal(tensor, before.unet.state_dict()[name])}
    assert len(changed) > len(before.unet.state_dict()) / 2
    for name, tensor in before.vae.state_dict().items():                # the other parts stay as they are
        assert torch.equal(tensor, after.vae.state_dict()[name])
    assert torch.equal(before.text(["a red circle"]).context, after.text(["a red circle"]).context)
    assert after.defaults == before.defaults
    assert torch.load(tmp_path / "out/training.pt", weights_only=True)["step"] == 3
    run = finetune(pictures, tmp_path / "out", "--steps", 4, "--batch", 2, "--rate", 1e-3)      # it goes on
    assert run.returncode == 0, run.stderr
    assert torch.load(tmp_path / "out/training.pt", weights_only=True)["step"] == 4
    more = ldm.load(tmp_path / "out/model", device="cpu").unet.state_dict()
    assert any(not torch.equal(tensor, after.unet.state_dict()[name]) for name, tensor in more.items())


def test_fine_tuning_learns_each_picture_with_its_own_caption_and_writes_the_average(tmp_path, monkeypatch):
    captions, means = {"red": "a red wall", "blue": "the sea"}, []
    for colour, text in captions.items():
        Image.new("RGB", (256, 256), colour).save(tmp_path / f"{colour}.png")
        (tmp_path / f"{colour}.txt").write_text(text)
    pipe, seen, loss = ldm.load(device="cpu"), [], fine_tuning.training.denoising_loss
    def watched(unet, x0, noise, t, sigma, text, prediction):
        seen.extend(zip(x0, text, strict=True))
        means.extend(noise.mean((2, 3)).flatten())
        return loss(unet, x0, noise, t, sigma, text, prediction)
    monkeypatch.setattr(fine_tuning.training, "denoising_loss", watched)
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(tmp_path), str(tmp_path / "out"), "--steps", "3",
                                      "--batch", "2", "--dropped", "0", "--rate", "1e-3", "--offset", "5"])
    fine_tuning.main()
    assert 2 < torch.stack(means).std() < 10                # of 24; without an offset 1/32
    counts = dict.fromkeys(captions, 0)
    with torch.no_grad():
        for colour, text in captions.items():
            levels    = torch.tensor(ImageColor.getrgb(colour)).view(1, 3, 1, 1)
            mean, std = pipe.encode((levels / 127.5 - 1).expand(1, 3, 256, 256))
            for x0, given in seen:
                if torch.equal(given, pipe.text([text]).context[0]):
                    counts[colour] += 1
                    assert (x0 - mean[0]).abs().max() < 6 * std.max()
    assert sum(counts.values()) == len(seen) == 6
    assert min(counts.values()) > 0
    average = torch.load(tmp_path / "out/training.pt", weights_only=True)["ema"]
    written = ldm.load(tmp_path / "out/model", device="cpu").unet.state_dict()
    assert all(torch.equal(average[name], tensor) for name, tensor in written.items())


def test_single_things_are_drawn_more_often_and_small_and_pointed_ones_once_they_are_visible():
    def scene(size, shape, count=2):
        things = (Thing("blue", shape, size, "plain", (2, 1), .74, .5, .12),
                  Thing("red", "circle", "large", "plain", (0, 1), .26, .5, .2))
        return Scene(things[:count], "white")
    scenes = [scene("large", "star"), scene("small", "square"), scene("small", "cross"),
              scene("large", "star", 1), scene("small", "square", 1)]
    visible, hidden = ([train_unet.emphasis(scene, visible) for scene in scenes] for visible in (True, False))
    assert visible == [8, 2, 4, 16, 4]
    assert hidden == [1, 1, 1, 2, 2]
    t = torch.tensor([train_unet.VISIBLE - 1, train_unet.VISIBLE]).repeat_interleave(40_000)
    weights = torch.tensor([visible, hidden])
    chosen = train_unet.choose(t, *weights, torch.Generator().manual_seed(0))
    for part, weight in zip(chosen.chunk(2), weights, strict=True):
        share = torch.bincount(part, minlength=5) / 40_000
        torch.testing.assert_close(share, weight / weight.sum(), atol=.01, rtol=0)


def test_timesteps_are_more_often_noisy_or_clear_where_that_is_asked():
    def shares(noisy, clear):
        t = train_unet.timesteps(100_000, noisy, clear, torch.Generator().manual_seed(0))
        return [float(part.float().mean()) for part in (t < 200, t < train_unet.CLEAR, t >= 800)]
    assert shares(0, 0) == pytest.approx([.2, .4, .2], abs=.005)
    assert shares(0, .5) == pytest.approx([.5 * .2 + .5 * .5, .5 * .4 + .5, .5 * .2], abs=.005)
    assert shares(.5, 0) == pytest.approx([.1, .2, .5 + .1], abs=.005)
    assert shares(.5, .5) == pytest.approx([.5 * .1 + .5 * .5, .5 * .2 + .5, .5 * .6], abs=.005)


@pytest.mark.parametrize("side", [8, 32, 47])
def test_a_window_holds_the_middle_of_a_thing_and_the_same_part_of_picture_and_latents(side):
    rng, corners = Random(0), []
    for place in (0, 1, 2):
        x, y  = world.GRID[place], world.GRID[2 - place]
        thing = Thing("blue", "star", "small", "plain", (place, 2 - place), x, y, .12)
        found = [train_vae.window(thing, side, rng) for _ in range(50)]
        assert all(left <= x * side < left + side / 2 for left, _ in found)
        assert all(top <= y * side < top + side / 2 for _, top in found)
        assert side < 10 or len(set(found)) > 5
        corners += found
    latents = torch.arange(float(side * side)).view(1, side, side)              # each has its number
    pixels  = latents.repeat_interleave(8, 1).repeat_interleave(8, 2)
    for left, top in corners:
        part, seen = (train_vae.window_of(a, (left, top), scale) for a, scale in ((latents, 1), (pixels, 8)))
        assert part[0, 0, 0] == side * top + left
        assert part.shape == (1, side // 2, side // 2)
        assert torch.equal(part.repeat_interleave(8, 1).repeat_interleave(8, 2), seen)


def test_polishing_trains_the_decoder_alone_on_windows_and_then_whole_pictures(tmp_path, monkeypatch):
    seen, loss = [], train_vae.reconstruction_loss
    def watched(decoded, images):
        seen.append(images.shape)
        return loss(decoded, images)
    monkeypatch.setattr(train_vae, "reconstruction_loss", watched)
    shutil.copytree(Path(ldm.__file__).parent / "assets/shapes/vae", tmp_path / "vae")
    before = load_vae(tmp_path / "vae").state_dict()
    train_vae.polish(tmp_path, steps=5, count=4, size=64, device="cpu")
    after = load_vae(tmp_path / "vae")
    changed = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "decoder.conv_in.weight" in changed
    assert not [name for name in changed if name.startswith(("encoder", "quant_conv"))]
    assert seen == [(16, 3, 32, 32)] * 4 + [(8, 3, 64, 64)]
    assert torch.load(tmp_path / "latents_64.pt", weights_only=True).shape == (4, 4, 8, 8)
    assert torch.load(tmp_path / "polish.pt", weights_only=True)["step"] == 5
