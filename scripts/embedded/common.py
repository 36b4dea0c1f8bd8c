"""What the training stages share: data loading, checkpoints that survive a kill at any moment, learning
rates, sheets of pictures."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from world import Scene, render

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))     # `ldm` of this checkout, installed or not

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them


def join(device: str) -> str:
    """Joins the processes of torchrun, if it started this one; returns the device of this process."""
    if WORLD == 1:
        return device
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; elsewhere PyTorch emulates it, slowly."""
    info = Path("/proc/cpuinfo")
    return info.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(info.read_text().split())


def draw(i: int) -> int:
    """What seeds step i of this process: no two processes see the same pictures."""
    return i * WORLD + RANK


def once(action: Callable[[], Any]) -> None:
    """Does it in the first process only, while the others wait: afterwards the files it writes are there for
    all."""
    if RANK == 0:
        action()
    if WORLD > 1:
        dist.barrier()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over the processes: a step of all of them is one step on all their samples. One exchange for all
    tensors."""
    if WORLD > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        together  = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(together)
        for g, mean in zip(gradients, (together / WORLD).split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view_as(g))


def pixels(scenes: list[Scene], size: int) -> Tensor:
    """The scenes' pictures as (N, 3, size, size) in [-1, 1]."""
    stack = np.stack([np.asarray(render(scene, size)) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def save(state: Any, path: Path) -> None:
    """Writes beside the file, then renames: whoever reads `path` finds the old state or the new one, never
    half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into; it takes the place and the name of `folder` when all is there."""
    building = folder.with_name(folder.name + ".new")
    shutil.rmtree(building, ignore_errors=True)
    yield building
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def resume(path: Path, state: dict[str, Any]) -> tuple[int, float]:
    """Loads a checkpoint into the modules and optimisers of `state`; returns the steps and seconds spent, 0
    and 0 without one."""
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path, weights_only=True, map_location="cpu")
    for name, holder in state.items():
        holder.load_state_dict(saved[name])
    return saved["step"], saved["seconds"]


def run(path: Path, state: dict[str, Any], steps: int, learning_rate: float,
        step: Callable[[int], dict[str, Tensor]], report: Callable[[int], str], every: int) -> None:
    """Trains: calls step(i) → losses by name, the first being minimised, until `steps`; reports and saves
    every `every` steps.

    `state` names what a checkpoint holds: everything with a state_dict, an optimiser under "optimiser" among
    it. The learning rate rises over 100 steps, stays, and falls linearly to 2 % over the second half.

    Under torchrun each process takes its own samples (`draw`) and the first one reports and saves.
    """
    done, seconds = resume(path, state)
    optimiser, start = state["optimiser"], time.time()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    sums: dict[str, float] = {}
    count = 0                                                              # of the steps in `sums`
    for i in range(done, steps):
        rate = learning_rate * min(1, (i + 1) / 100, max(.02, (steps - i) / (.5 * steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        losses = step(i)
        optimiser.zero_grad(set_to_none=True)
        next(iter(losses.values())).backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        for holder in state.values():
            if hasattr(holder, "update"):                                   # a running average of the weights
                holder.update(i)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + float(loss.detach())
        count += 1
        if RANK == 0 and ((i + 1) % every == 0 or i + 1 == steps):
            spent = seconds + time.time() - start
            means = "  ".join(f"{name} {value / count:.4f}" for name, value in sums.items())
            print(f"{path.stem} {i + 1}/{steps}  {spent / 60:.1f} min  {means}  {report(i + 1)}", flush=True)
            progress = {"step": i + 1, "seconds": spent}
            save({name: holder.state_dict() for name, holder in state.items()} | progress, path)
            sums, count = {}, 0
    once(lambda: None)              # nobody reads the checkpoint before its last state is written


def sheet(images: Tensor, columns: int, path: Path) -> None:
    """Saves pictures (N, 3, H, W) in [-1, 1] as one PNG."""
    array = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    n, h, w, _ = array.shape
    canvas = Image.new("RGB", (columns * (w + 4), -(-n // columns) * (h + 4)), (255, 255, 255))
    for i, picture in enumerate(array):
        canvas.paste(Image.fromarray(picture), (i % columns * (w + 4), i // columns * (h + 4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
