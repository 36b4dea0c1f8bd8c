"""How fast, in how much memory, and how far from what the machine could do: ldm beside diffusers.

    python scripts/benchmark.py --quick          on a CPU, minutes: one step, one decode, memory, a cold start
    python scripts/benchmark.py                  half an hour: compiler, changes, loading, scaling, too
    python scripts/benchmark.py --part loading   one part or several, into the JSON that is there
    python scripts/benchmark.py --part original --original stable-diffusion      beside the code of CompVis
    python scripts/benchmark.py --device cuda    on a GPU: whole pictures of SD 1.5 and SDXL, batches, memory
    python scripts/benchmark.py --tables         tables and plots of docs/speed.md again, from the JSON files

Both libraries get the same random weights of the published shapes, in one process, and take turns in an order
that changes; shown is the median, and in brackets the fastest and the slowest. The ratio is the
median of the ratios of each round: above 1, ldm is faster. The floor is the counted floating-point operations
at the measured rate of a large matrix product, or of a convolution, if that is higher. On a CPU with
--threads 1 the clock is the process's own, so a busy machine does less harm; but `cold` and `loading`, in
processes of their own, are timed on the wall.

Results are written to docs/benchmarks/NAME.json. Needs the extra `test`; for a plot, matplotlib.
"""
import argparse
import gc
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts"), str(ROOT / "scripts" / "embedded")]

import original
import torch
import torch.nn.functional as F
from common import native_bfloat16
from oracles import SD, SD_VAE, SDXL_VAE, UNETS
from peak import Peak
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ldm
from ldm import fast
from ldm.fast import kernels
from ldm.models import VAE, UNet, UNetConfig, VAEConfig
from ldm.models.layers import GEGLU, Attention, ResBlock
from ldm.noise_schedule import NoiseSchedule
from ldm.pipeline import Defaults
from ldm.weights import rename_ldm_unet

START   = time.perf_counter()
RESULTS = ROOT / "docs" / "benchmarks"
IMAGES  = ROOT / "docs" / "images"
PAGE    = ROOT / "docs" / "speed.md"
SIZES   = {"SD 1.5": 512, "SDXL base": 1024}                    # pixels
QUICK   = "step", "decode", "memory", "cold"                    # the parts of --quick


# ── The machine ─────────────────────────────────────────────────────────────────────────────────────────────

def machine(device: str, clock: str) -> dict[str, Any]:
    import diffusers
    import transformers
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu   = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"device": torch.cuda.get_device_name() if device == "cuda" else cpu, "cpu": cpu,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "clock": clock,
            "python": platform.python_version(), "torch": torch.__version__, "ldm": ldm.__version__,
            "diffusers": diffusers.__version__, "transformers": transformers.__version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def days(measured: str, today: str) -> str:
    """The date of a JSON to which a part is added today: "first", or "first to last"."""
    return " to ".join(sorted({measured[:10], today}))


class Clock:
    """Seconds of a call; on CUDA all of its kernels are waited for."""

    def __init__(self, device: str):
        self.device = device
        self.own    = device == "cpu" and torch.get_num_threads() == 1
        self.name   = "of the process" if self.own else "on the wall"

    def __call__(self, function: Callable[[], Any]) -> float:
        now = time.process_time if self.own else time.perf_counter
        self.wait()
        start = now()
        function()
        self.wait()
        return now() - start

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def rates(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """A second, measured: floating-point operations of a matrix product, and of a convolution with the
    channels last; bytes read and written by a copy."""
    side  = 8192 if clock.device == "cuda" else 2048
    maps, kernel = (torch.randn(shape, device=clock.device).to(dtype, memory_format=torch.channels_last)
                    for shape in ((2, 512, 64, 64), (512, 512, 3, 3)))
    a, b  = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    large = torch.randn(2**28 if clock.device == "cuda" else 2**26, device=clock.device)
    other = torch.empty_like(large)
    def best(function: Callable[[], Any]) -> float:
        return min(clock(function) for _ in range(40))          # a shared machine is rarely all ours
    return {"product": 2 * side**3 / best(lambda: a @ b),
            "convolution": 2 * kernel.numel() * 2 * 64**2 / best(lambda: F.conv2d(maps, kernel, padding=1)),
            "bytes": 2 * large.numel() * large.element_size() / best(lambda: other.copy_(large))}


def peak_of(rates: dict[str, float]) -> float:
    """Floating-point operations a second: of the faster of the two, as libraries differ in their products."""
    return max(rates["product"], rates.get("convolution", 0))


# ── Counting ────────────────────────────────────────────────────────────────────────────────────────────────

def unet_inputs(family: str, batch: int, device: str, dtype: torch.dtype, pixels: int = 0) -> tuple[Any, ...]:
    """x, t, context and vector of a call with guidance: two of each picture."""
    config, side = UNetConfig.from_hf(UNETS[family]), (pixels or SIZES[family]) // 8
    def random(*shape: int) -> Tensor:
        return torch.randn(2 * batch, *shape, device=device, dtype=dtype)
    return (random(config.in_channels, side, side), torch.tensor(500.0, device=device),
            random(77, config.context_dim), random(config.vector_dim) if config.vector_dim else None)


def counts() -> dict[str, dict[str, float]]:
    """Floating-point operations and parameters, counted on the meta device, where nothing is computed."""
    found: dict[str, dict[str, float]] = {}

    def count(name: str, module: nn.Module, call: Callable[[], Any]) -> None:
        with FlopCounterMode(display=False) as counter:
            call()
        found[name] = {"flops": float(counter.get_total_flops()),
                       "parameters": sum(weight.numel() for weight in module.parameters())}
    with torch.device("meta"), torch.no_grad():
        for family in SIZES:
            unet   = UNet(UNetConfig.from_hf(UNETS[family]))
            inputs = unet_inputs(family, 1, "meta", torch.float32)
            count(f"{family}, one call with guidance", unet, lambda unet=unet, inputs=inputs: unet(*inputs))
        unet = UNet(UNetConfig.from_hf(UNETS["SD 1.5"]))
        for size in (256, 768, 1024):                           # for the bends of `scaling`
            inputs = unet_inputs("SD 1.5", 1, "meta", torch.float32, size)
            count(f"the same of SD 1.5 at {size} × {size}", unet, lambda inputs=inputs: unet(*inputs))
        for size in (512, 1024):
            vae = VAE(VAEConfig.from_hf(SD_VAE))
            z   = torch.randn(1, 4, size // 8, size // 8)
            count(f"decode, {size} × {size}", vae.decoder, lambda vae=vae, z=z: vae.decode(z))
    return found


# ── Modules with the same random weights ────────────────────────────────────────────────────────────────────

def filled(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """A module with weights: one block of random numbers, repeated. Matrices keep the variance."""
    with torch.device("meta"):
        module = build()
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, old in list(module.named_parameters()):
        size   = old.numel()
        tensor = block.repeat(-(-size // len(block)))[:size].view(old.shape).clone()
        tensor = (tensor * (size / len(old)) ** -0.5 if old.ndim > 1 else
                  0.02 * tensor + (not name.endswith("bias")))
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
    return module.eval()


def twin(build: Callable[[], nn.Module], module: nn.Module) -> nn.Module:
    """diffusers' module over the very same tensors."""
    with torch.device("meta"):
        theirs = build()
    theirs.load_state_dict(module.state_dict(), assign=True)
    return theirs.requires_grad_(False).eval()


def unets(family: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    import diffusers
    config = UNETS[family]
    ours   = filled(lambda: UNet(UNetConfig.from_hf(config)), device, dtype)
    return ours, twin(lambda: diffusers.UNet2DConditionModel.from_config(config), ours)


def vaes(device: str, dtype: torch.dtype, family: str = "SD 1.5") -> tuple[nn.Module, nn.Module]:
    """Both run in `dtype`, XL's as well: its published weights are too large for float16, these are not."""
    import diffusers
    config = {**(SDXL_VAE if family == "SDXL base" else SD_VAE), "force_upcast": False}
    ours   = filled(lambda: VAE(VAEConfig.from_hf(config)), device, dtype)
    return ours, twin(lambda: diffusers.AutoencoderKL.from_config(config), ours)


# ── Taking turns ────────────────────────────────────────────────────────────────────────────────────────────

def turns(clock: Clock, calls: dict[str, Callable[[], Any]], rounds: int,
          warm: dict[str, Callable[[], Any]] | None = None) -> dict[str, list[float]]:
    """Seconds of each call, in rounds of one each. The order changes: after two rounds for each call, each
    was first and last equally often, and once came after itself, when it may find its memory still at hand.
    `warm` is before, and not counted: once on a CPU, three times on a GPU, where graphs are recorded in the
    second call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(3 if clock.device == "cuda" else 1):
            for call in (warm or calls).values():
                call()
        names = list(calls)
        for i in range(rounds):
            first = i // 2 % len(names)
            order = names[first:] + names[:first]
            for name in order if i % 2 else reversed(order):
                seconds[name].append(clock(calls[name]))
    return seconds


def row(what: str, seconds: dict[str, list[float]], *, flops: float = 0, peak_flops: float = 0,
        steps: int = 1, pictures: int = 1, memory: dict[str, int] | None = None,
        rival: str = "diffusers") -> dict[str, Any]:
    """What was measured, and what follows for each contestant. Prints it."""
    result: dict[str, Any] = {"what": what, "flops": flops, "rival": rival, "contestants": {}}
    rivals = seconds.get(rival)
    for name, each in seconds.items():
        median = statistics.median(each)
        one: dict[str, Any] = {"seconds": median, "fastest": min(each), "slowest": max(each),
                               "rounds": len(each), "it_per_s": steps / median,
                               "pictures_per_s": pictures / median}
        if rivals:
            one["ratio"] = statistics.median(b / a for a, b in zip(each, rivals, strict=True))
        if memory:
            one["peak_bytes"] = memory[name]
        result["contestants"][name] = one
        print(f"{what:34s} {name:22s} {median:9.3f} s [{min(each):.3f} … {max(each):.3f}]"
              + (f"  × {one['ratio']:.3f}" if "ratio" in one else "")
              + (f"  {100 * flops / peak_flops / median:.0f} % of the floor" if flops else ""), flush=True)
    return result


def of(dtype: torch.dtype) -> str:
    """What to add to the name of a row."""
    return ", bfloat16" if dtype == torch.bfloat16 else ""


def optimized(unet: nn.Module) -> Any:
    """SD 1.5's U-Net as `ldm.fast.optimize` leaves it on a CPU."""
    return fast.optimize(stand_in("SD 1.5", unet, nn.Linear(1, 1))).unet


def one_step(clock: Clock, dtype: torch.dtype, rounds: int, peak: float, flops: float,
             quick: bool) -> dict[str, Any]:
    """quick: fewer contestants, and they warm up on a quarter of the picture."""
    ours, theirs = unets("SD 1.5", clock.device, dtype)
    networks = {"diffusers": theirs, "ldm": ours, "ldm.fast": optimized(ours)}
    if not quick:
        networks["ldm.fast, channels first"] = fast.prompt_once(fast.packed(fast.in_place(ours)))

    def calls(pixels: int) -> dict[str, Callable[[], Any]]:
        inputs = unet_inputs("SD 1.5", 1, clock.device, dtype, pixels)[:3]
        return {name: lambda network=network: network(*inputs) for name, network in networks.items()}
    return row(f"SD 1.5, 512², one guided step{of(dtype)}",
               turns(clock, calls(512), rounds, calls(256 if quick else 512)), flops=flops, peak_flops=peak)


def compiled_step(clock: Clock, dtype: torch.dtype, rounds: int, peak: float, flops: float,
                  _: bool) -> dict[str, Any]:
    """What torch.compile makes of both on a CPU, beside what they are without; it compiles in the warm-up."""
    ours, theirs = unets("SD 1.5", clock.device, dtype)
    whole    = stand_in("SD 1.5", ours, nn.ModuleDict({"decoder": nn.Linear(1, 1)}))
    inputs   = unet_inputs("SD 1.5", 1, clock.device, dtype)[:3]
    networks = {"diffusers": theirs, "diffusers compiled": torch.compile(theirs, fullgraph=True),
                "ldm.fast": optimized(ours), "ldm.fast compiled": fast.optimize(whole, compile=True).unet}
    return row(f"SD 1.5, 512², one guided step beside torch.compile{of(dtype)}",
               turns(clock, {name: lambda network=network: network(*inputs)
                             for name, network in networks.items()}, rounds), flops=flops, peak_flops=peak)


def original_step(clock: Clock, rounds: int, peak: float, flops: float, folder: Path) -> dict[str, Any]:
    """Beside the first code of Stable Diffusion, whose U-Net gets the same weights, and gives the same."""
    theirs = filled(lambda: original_class(folder)(**original.FAMILIES["SD 1.5"].unet), clock.device,
                    torch.float32)
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_hf(UNETS["SD 1.5"]))
    ours.load_state_dict(rename_ldm_unet(theirs.state_dict(), ours.state_dict()), assign=True)
    quick = optimized(ours.eval())
    x, t, context = unet_inputs("SD 1.5", 1, clock.device, torch.float32)[:3]
    calls = {"CompVis": lambda: theirs(x, timesteps=t.expand(len(x)), context=context),
             "ldm": lambda: ours(x, t, context), "ldm.fast": lambda: quick(x, t, context)}
    with torch.inference_mode():
        torch.testing.assert_close(calls["ldm"](), calls["CompVis"](), rtol=1e-3, atol=1e-3)
    return row("SD 1.5, 512², one guided step beside CompVis", turns(clock, calls, rounds),
               flops=flops, peak_flops=peak, rival="CompVis")


def original_class(folder: Path) -> Any:
    """The class of the U-Net in a folder with https://github.com/CompVis/stable-diffusion (needs einops).

    Its package has the name of ours, which is put back afterwards.
    """
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "ldm"}
    sys.meta_path.append(original.Stubs())
    original.take_from(folder)
    try:
        return importlib.import_module("ldm.modules.diffusionmodules.openaimodel").UNetModel
    finally:
        original.take_from(ROOT)
        sys.modules.update(ours)


def on_a_cpu(measure: Callable[..., dict[str, Any]], clock: Clock, rounds: int, rates: dict[str, float],
             flops: float, quick: bool) -> list[dict[str, Any]]:
    """A step or a decode in float32; and in bfloat16, where the CPU knows it."""
    rows = [measure(clock, torch.float32, rounds, peak_of(rates), flops, quick)]
    if "bfloat16" not in rates:
        print("no rows in bfloat16: this CPU has neither avx512_bf16 nor amx_bf16, PyTorch would emulate it")
        return rows
    rows.append(measure(clock, torch.bfloat16, rounds, rates["bfloat16"], flops, quick) | {"in": "bfloat16"})
    for one in rows[1]["contestants"].values():
        one["ratio_to_float32"] = rows[0]["contestants"]["diffusers"]["seconds"] / one["seconds"]
    return rows


def one_decode(clock: Clock, dtype: torch.dtype, rounds: int, peak: float, flops: float,
               quick: bool) -> dict[str, Any]:
    """quick: as for one_step."""
    ours, theirs = vaes(clock.device, dtype)
    decoders = {"diffusers": lambda z: theirs.decode(z / theirs.config.scaling_factor).sample,
                "ldm": ours.decode, "ldm.fast": fast.channels_last(ours).decode}
    if not quick:
        decoders["fast.tiled"] = fast.tiled(ours).decode

    def calls(pixels: int) -> dict[str, Callable[[], Any]]:
        z = torch.randn(1, 4, pixels // 8, pixels // 8, device=clock.device, dtype=dtype)
        return {name: lambda decode=decode: decode(z) for name, decode in decoders.items()}
    return row(f"decode, 512²{of(dtype)}", turns(clock, calls(512), rounds, calls(256 if quick else 512)),
               flops=flops, peak_flops=peak)


# ── One change at a time ────────────────────────────────────────────────────────────────────────────────────

def changes(clock: Clock, rounds: int) -> list[dict[str, Any]]:
    """Blocks of SD 1.5 at 512², two pictures, before and after a change; some that ldm.fast leaves out. In
    float32; attention in bfloat16 too, where the CPU knows it."""
    found: list[dict[str, Any]] = []

    def compare(what: str, kept: bool, before: Callable[[], Any], after: Callable[[], Any]) -> None:
        seconds = turns(clock, {"before": before, "after": after}, rounds)
        before_, after_ = seconds["before"], seconds["after"]
        ratio = statistics.median(b / a for b, a in zip(before_, after_, strict=True))
        found.append({"what": what, "kept": kept, "before": statistics.median(before_),
                      "after": statistics.median(after_), "ratio": ratio})
        print(f"{what:64s} × {ratio:.2f} {'' if kept else '(left out)'}", flush=True)

    def residual(width: int, side: int) -> None:
        block  = ResBlock(width, width, 1280, 32, 1e-5)
        convs  = block.conv1, block.conv2
        pack   = fast.rebuilt(block, lambda part: kernels.PackedConv(part) if part in convs else None)
        x, e   = torch.randn(2, width, side, side), torch.randn(2, 1280)
        conv   = deepcopy(block.conv1).to(memory_format=torch.channels_last)
        y, at  = x.contiguous(memory_format=torch.channels_last), f"{width} channels, {side} × {side}"
        wide   = block.conv1.weight.numel() >= kernels.WIDE
        compare(f"packed: ResBlock, {at}", wide, lambda: block(x, e), lambda: pack(x, e))
        compare(f"channels last: convolution, {at}", not wide, lambda: block.conv1(x), lambda: conv(y))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(y.unflatten(-1, (8, -1)).transpose(1, 2) for y in (q, k, v)))

    def transformer(width: int, side: int) -> None:
        tokens, at = torch.randn(2, side * side, width), f"{width} channels, {side} × {side}"
        gates,   q = GEGLU(width, 4 * width), torch.randn(3, width, width) / width**0.5
        lean       = fast.in_place(nn.Sequential(gates))[0]
        compare(f"in_place: GEGLU, {at}", True, lambda: gates(tokens), lambda: lean(tokens))
        compare(f"Q, K and V in one product: self-attention, {at}", False,
                lambda: attention(*(F.linear(tokens, one) for one in q)),
                lambda: attention(*F.linear(tokens, q.flatten(0, 1)).chunk(3, dim=-1)))

    def unfused(width: int, side: int) -> None:
        block  = Attention(width, width, 8).to(torch.bfloat16)
        apart  = fast.unfused(nn.Sequential(block))[0]
        tokens = torch.randn(2, side * side, width, dtype=torch.bfloat16)
        compare(f"unfused: self-attention, {width} channels, {side} × {side}, bfloat16", True,
                lambda: block(tokens), lambda: apart(tokens))

    for width, side in ((320, 64), (640, 32), (1280, 16), (1280, 8)):
        residual(width, side)
    for width, side in ((320, 64), (640, 32), (1280, 16)):
        transformer(width, side)
        if native_bfloat16():
            unfused(width, side)
    return found


# ── Cold processes ──────────────────────────────────────────────────────────────────────────────────────────

FIRST_PICTURE = """
import sys, time
start = time.perf_counter()
import ldm
pipe = ldm.load(device='cpu')
ldm.sample("a red circle on a blue background", pipe)
first = time.perf_counter() - start
start = time.perf_counter()
ldm.sample("a red circle on a blue background", pipe)
print(first, time.perf_counter() - start)
"""
LOADERS = {"ldm":       ("import ldm", "ldm.load({folder!r}, device='cpu')", "pipe.text.model"),
           "diffusers": ("from diffusers import StableDiffusionPipeline",
                         "StableDiffusionPipeline.from_pretrained({folder!r}, safety_checker=None)",
                         "pipe.text_encoder")}
LOADING = """
import time
from transformers import CLIPTextModel, CLIPTokenizer
{imports}
def memory(kind):
    return 1024 * int(open("/proc/self/status").read().split(kind + ":")[1].split()[0])
before, start = memory("VmRSS"), time.perf_counter()
pipe = {call}
loaded = time.perf_counter() - start
for module in (pipe.unet, pipe.vae, {text}):
    for weight in module.parameters():
        weight.sum()
print(loaded, time.perf_counter() - start, memory("VmHWM") - before)
"""


def run(code: str) -> list[float]:
    """The numbers that a fresh Python prints in its last line."""
    threads = str(torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads})
    return [float(word) for word in done.stdout.split("\n")[-2].split()]


def cold(rounds: int) -> list[dict[str, Any]]:
    timed   = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    heavy   = "import torch; from transformers import CLIPTextModel, CLIPTokenizer"
    runs    = [(run(timed.format("import ldm"))[0], run(timed.format(heavy))[0], *run(FIRST_PICTURE))
               for _ in range(rounds)]
    imports = row("import", {"ldm":                      [one[0] for one in runs],
                             "torch, CLIP's two classes": [one[1] for one in runs]})
    first   = row("first picture, embedded model", {
        "from a cold process": [one[2] for one in runs],
        "the imports and a second picture": [one[1] + one[3] for one in runs]})
    first["ratio"] = statistics.median(one[2] / (one[1] + one[3]) for one in runs)
    print(f"first picture / (imports + second picture) = {first['ratio']:.3f}")
    return [imports, first]


def loading(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Stable Diffusion 1.5 from files into memory, after the imports: time, and peak beyond theirs.

    Both libraries map the files, which are read where a weight is used. So every weight is used once before
    the peak is taken. It is that of the resident memory, beyond what was resident before; it counts mapped
    pages, which the system may drop. Linux only; not by getrusage, whose peak a process inherits.
    """
    if not (folder / "model_index.json").exists():
        import full_size
        full_size.write(folder)
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    found: dict[str, list[list[float]]] = {name: [] for name in LOADERS}
    for _ in range(1 + rounds):
        for name, (imports, call, text) in LOADERS.items():
            code = LOADING.format(imports=imports, call=call.format(folder=str(folder)), text=text)
            found[name].append(run(code))
    found = {name: each[1:] for name, each in found.items()}     # the first read the disk
    call, read = ({name: [one[i] for one in each] for name, each in found.items()} for i in (0, 1))
    memory = {name: int(max(one[2] for one in each)) for name, each in found.items()}
    rows   = [row("load SD 1.5, float32: the call", call),
              row("load SD 1.5, float32: until all is read", read, memory=memory)]
    for name, one in rows[1]["contestants"].items():
        one["of_weights"] = one["peak_bytes"] / weights
        print(f"{name}: peak {one['of_weights']:.3f} of the weights")
    return rows


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────────────────

def memory(device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """The most memory that the tensors of a step or a decode take at one time, besides the weights.

    On a GPU as its allocator counts; on a CPU with tensors that have sizes but no numbers, result by result.
    """
    import diffusers
    results: list[dict[str, Any]] = []

    def cast(module: nn.Module) -> nn.Module:
        return module if dtype == torch.float32 else module.to(dtype)          # what is fake cannot be moved

    def note(what: str, size: int, calls: dict[str, Callable[[], Any]]) -> None:
        found = {name: _peak(device, call) for name, call in calls.items()}
        results.append({"what": f"{what}, {size}², {str(dtype).removeprefix('torch.')}", "bytes": found})
        print(f"{results[-1]['what']:34s}", {name: f"{x / 1e9:.3f} GB" for name, x in found.items()})

    with FakeTensorMode() if device == "cpu" else nullcontext(), torch.device(device), torch.no_grad():
        unet     = cast(UNet(UNetConfig.from_hf(UNETS["SD 1.5"])))
        theirs   = cast(diffusers.UNet2DConditionModel.from_config(UNETS["SD 1.5"]))
        networks = {"diffusers": theirs, "ldm": unet, "fast.in_place": fast.in_place(unet)}
        for size in sizes:
            inputs = unet_inputs("SD 1.5", 1, device, dtype, size)[:3]
            note("SD 1.5, one guided step", size, {
                name: lambda network=network, inputs=inputs: network(*inputs)
                for name, network in networks.items()})
        vae   = cast(VAE(VAEConfig.from_hf(SD_VAE)))
        calls = {"diffusers": cast(diffusers.AutoencoderKL.from_config(SD_VAE)).decode,
                 "ldm": vae.decode, "fast.tiled": fast.tiled(vae).decode}
        if device == "cuda":
            calls["fast.tiled, store='cpu'"] = fast.tiled(vae, store="cpu").decode
        for size in sizes:
            z = torch.zeros(1, 4, size // 8, size // 8, dtype=dtype)
            note("decode", size, {name: lambda call=call, z=z: call(z) for name, call in calls.items()})
    return results


def _peak(device: str, call: Callable[[], Any]) -> int:
    if device == "cpu":
        with Peak() as peak:
            call()
        return peak.bytes
    call()                                      # the first one also allocates the libraries' workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


# ── Scaling ─────────────────────────────────────────────────────────────────────────────────────────────────

def scaling(clock: Clock, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Time and memory over batch, steps and size, one at a time, with their exponents.

    On a GPU of whole runs of SD 1.5. On a CPU batch and steps are of runs of the embedded model, and size is
    of a guided call of SD 1.5's U-Net: timed as far as 1024 pixels, with the memory that `Peak` counts.
    """
    if clock.device == "cuda":
        pipe  = stand_in("SD 1.5", unets("SD 1.5", "cuda", dtype)[0], vaes("cuda", dtype)[0])
        found = scaling_of_runs(clock, "SD 1.5", pipe, {"height": (256, 512, 1024, 2048)})
    else:
        found = scaling_of_runs(clock, "embedded model", ldm.load(device="cpu"), {})
        found.append(scaling_of_size(clock))
    for one in found:
        one |= {f"{key}_exponents": exponents(one["points"], key) for key in ("seconds", "bytes")}
    return found


def scaling_of_runs(clock: Clock, name: str, pipe: ldm.Pipeline,
                    more: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    base = {"num_images": 1, "height": pipe.defaults.height, "steps": 10}
    grid = {"num_images": (1, 2, 4, 8, 16, 32), "steps": (10, 20, 50, 100), **more}
    unit = {"num_images": "pictures in a batch", "steps": "steps", "height": "pixels a side"}
    found = []
    for key, values in grid.items():
        points = []
        for value in values:
            how = {**base, key: value}
            def call(how: dict[str, Any] = how) -> Any:
                return ldm.sample("a red circle", pipe, **how, width=how["height"], output_type="latent",
                                  progress=False)
            points.append(point(value, turns(clock, {"run": call}, 3)["run"], _peak(clock.device, call)))
        found.append({"what": f"{unit[key]}, {name}", "points": points})
    return found


def scaling_of_size(clock: Clock) -> dict[str, Any]:
    def build() -> UNet:
        return UNet(UNetConfig.from_hf(UNETS["SD 1.5"]))

    def calls(unet: Callable[..., Any], sizes: tuple[int, ...]) -> dict[int, Callable[[], Any]]:
        inputs = {size: unet_inputs("SD 1.5", 1, "cpu", torch.float32, size)[:3] for size in sizes}
        return {size: lambda size=size: unet(*inputs[size]) for size in sizes}
    with FakeTensorMode(), torch.no_grad():
        counted = calls(build(), (256, 512, 768, 1024, 2048))
        peaks   = {size: _peak("cpu", call) for size, call in counted.items()}
    timed   = calls(filled(build, "cpu", torch.float32), (256, 512, 768, 1024))
    seconds = {size: turns(clock, {"call": call}, 2, {"warm": timed[256]})["call"]
               for size, call in timed.items()}
    return {"what": "pixels a side, SD 1.5's U-Net, one guided call",
            "points": [point(size, seconds.get(size), peak) for size, peak in peaks.items()]}


def point(at: int, seconds: list[float] | None, peak: int) -> dict[str, Any]:
    """One value of what is varied; no seconds where the run would take too long."""
    one = {"at": at, "seconds": seconds and statistics.median(seconds), "bytes": peak}
    print(f"scaling, {at}: {one['seconds']} s, {peak / 1e6:.1f} MB", flush=True)
    return one


def exponents(points: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The p of y ∝ xᵖ: between neighbours, and of all by least squares; on logarithms both."""
    x, y = zip(*((math.log(one["at"]), math.log(one[key])) for one in points if one[key]), strict=True)
    return {"between": [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)],
            "overall": statistics.linear_regression(x, y).slope}


# ── Whole pictures on a GPU ─────────────────────────────────────────────────────────────────────────────────

def stand_in(family: str, unet: Any, vae: Any) -> ldm.Pipeline:
    """A pipeline whose text encoder answers with fixed random states."""
    config  = UNetConfig.from_hf(UNETS[family])
    weight  = next(unet.parameters())
    context = torch.randn(1, 77, config.context_dim, device=weight.device, dtype=weight.dtype)
    pooled  = torch.randn(1, 1280, device=weight.device, dtype=weight.dtype)

    def text(prompts: Any) -> ldm.Conditioning:
        count = len(prompts)
        return ldm.Conditioning(context.expand(count, -1, -1),
                                pooled.expand(count, -1) if config.vector_dim else None)
    return ldm.Pipeline(text, unet, vae, NoiseSchedule.from_hf(SD), scheduler_config=SD, defaults=Defaults(
        scheduler="pndm" if family == "SD 1.5" else "euler", height=SIZES[family], width=SIZES[family]))


def their_pipeline(family: str, unet: nn.Module, vae: nn.Module) -> Any:
    import diffusers
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    if family == "SD 1.5":
        scheduler = diffusers.PNDMScheduler.from_config({**SD, "skip_prk_steps": True})
        pipe = diffusers.StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler,
                                                 requires_safety_checker=False, **parts)
    else:
        del parts["safety_checker"]
        scheduler = diffusers.EulerDiscreteScheduler.from_config({**SD, "timestep_spacing": "leading"})
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=vae, unet=unet, scheduler=scheduler, add_watermarker=False, text_encoder_2=None,
            tokenizer_2=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CONTESTANTS = ("diffusers", "ldm", "diffusers compiled", "ldm.fast", "ldm.fast compiled")


def contestant(name: str, family: str, dtype: torch.dtype, batch: int, steps: int) -> Callable[[], Any]:
    """Text states to pixels, with own weights; diffusers eager, or as its documentation compiles it."""
    unet, their_unet = unets(family, "cuda", dtype)
    vae, their_vae   = vaes("cuda", dtype, family)
    pipe   = stand_in(family, unet, vae)
    if name.startswith("ldm"):
        if "fast" in name:
            pipe = fast.optimize(pipe, compile="compiled" in name)
        return lambda: ldm.sample(["x"] * batch, pipe, steps=steps, output_type="pt", progress=False)
    cond   = pipe.text([""] * batch)
    states = {"prompt_embeds": cond.context, "negative_prompt_embeds": cond.context}
    if cond.vector is not None:
        states |= {"pooled_prompt_embeds": cond.vector, "negative_pooled_prompt_embeds": cond.vector}
    theirs = their_pipeline(family, their_unet, their_vae)
    if "compiled" in name:
        theirs.unet.to(memory_format=torch.channels_last)
        theirs.vae.to(memory_format=torch.channels_last)
        theirs.unet       = torch.compile(theirs.unet, mode="max-autotune", fullgraph=True)
        theirs.vae.decode = torch.compile(theirs.vae.decode, mode="max-autotune", fullgraph=True)
    return lambda: theirs(**states, num_inference_steps=steps, output_type="pt")


def gpu_peak(name: str, family: str, dtype: torch.dtype, batch: int) -> int:
    """Bytes that one contestant alone, in this process, takes from the GPU for two steps, once it is warm.
    Reserved, not allocated: what CUDA graphs hold counts too."""
    call = contestant(name, family, dtype, batch, 2)
    with torch.inference_mode():
        call()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
    return torch.cuda.max_memory_reserved()


def gpu_pictures(family: str, clock: Clock, dtype: torch.dtype, batch: int, steps: int, rounds: int,
                 flops: float, peak_flops: float) -> dict[str, Any]:
    """Seconds in turns, in this process; memory in a process for each contestant."""
    def peak(name: str) -> int:
        command = [sys.executable, __file__, "--peak", name, family, str(batch)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    memory  = {name: peak(name) for name in CONTESTANTS}
    torch.compiler.reset()              # else what was compiled for one batch is made anew for any batch
    gc.collect()
    torch.cuda.empty_cache()
    seconds = turns(clock, {name: contestant(name, family, dtype, batch, steps)
                            for name in CONTESTANTS}, rounds)
    decode  = counts()[f"decode, {SIZES[family]} × {SIZES[family]}"]["flops"]
    calls_of_unet = steps + (family == "SD 1.5")    # PNDM makes one more
    return row(f"{family}, {SIZES[family]}², {steps} steps, batch {batch}", seconds, steps=steps,
               pictures=batch, flops=batch * (calls_of_unet * flops + decode), peak_flops=peak_flops,
               memory=memory)


# ── Tables ──────────────────────────────────────────────────────────────────────────────────────────────────

def tables(name: str, result: dict[str, Any]) -> str:
    """A result, and of which file, as Markdown."""
    m, rate     = result["machine"], result["rates"]
    convolution = f"{rate['convolution'] / 1e12:.3g} in a convolution, " if "convolution" in rate else ""
    convolution += f"{rate['bfloat16'] / 1e12:.3g} in bfloat16 at best, " if "bfloat16" in rate else ""
    lines = [f"{m['device']}, {m['threads']} CPU threads, PyTorch {m['torch']}, diffusers {m['diffusers']}, "
             f"{m['date']}; clock {m['clock']}. {result['dtype']}; measured: "
             f"{rate['product'] / 1e12:.3g} TFLOP/s in a matrix product, {convolution}"
             f"{rate['bytes'] / 1e9:.3g} GB/s in a copy. The run took "
             f"{sum(result['spent'].values()):.0f} s.", "",
             "| | | seconds (fastest … slowest) | it/s | pictures/s | of the floor | against diffusers | "
             "peak memory |",
             "|---|---|---|---|---|---|---|---|"]
    for one in result["rows"]:
        for who, found in one["contestants"].items():
            floor  = one["flops"] / (rate["bfloat16"] if one.get("in") == "bfloat16" else peak_of(rate))
            share  = f"{100 * floor / found['seconds']:.0f} %" if floor else ""
            ratio  = f"× {found['ratio']:.2f}" if "ratio" in found else ""
            ratio += f" ({one['rival']})" if ratio and one.get("rival", "diffusers") != "diffusers" else ""
            if "ratio_to_float32" in found:
                ratio += f", × {found['ratio_to_float32']:.2f} diffusers' float32"
            memory = f"{found['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in found else ""
            memory += f", × {found['of_weights']:.2f} the weights" if "of_weights" in found else ""
            made   = f"{found['pictures_per_s']:.3g}" if "steps" in one["what"] else ""
            speed  = f"{found['it_per_s']:.3g}" if "step" in one["what"] else ""
            lines.append(f"| {one['what']} | {who} | {found['seconds']:.3g} ({found['fastest']:.3g} … "
                         f"{found['slowest']:.3g}) | {speed} | {made} | {share} | {ratio} | {memory} |")
    if result.get("changes"):
        lines += ["", "| change | before | after | gain | |", "|---|---|---|---|---|"]
        for one in result["changes"]:
            lines.append(f"| {one['what']} | {1e3 * one['before']:.3g} ms | {1e3 * one['after']:.3g} ms | "
                         f"× {one['ratio']:.2f} | {'' if one['kept'] else 'left out'} |")
    if result.get("memory"):
        names  = list(dict.fromkeys(name for one in result["memory"] for name in one["bytes"]))
        lines += ["", "| memory of tensors besides the weights | " + " | ".join(names) + " |",
                  "|---|" + "---|" * len(names)]
        for one in result["memory"]:
            sizes = [f"{one['bytes'][who] / 1e9:.3g} GB" if who in one["bytes"] else "" for who in names]
            lines.append(f"| {one['what']} | {' | '.join(sizes)} |")
    if result.get("scaling"):
        lines += ["", f"![Seconds and memory over batch, steps and size](images/scaling-{name}.svg)", "",
                  "| scaling over | at | seconds | exponent | memory | exponent |",
                  "|---|---|---|---|---|---|"]
    for one in result.get("scaling", []):
        slopes = [[None, *one[f"{key}_exponents"]["between"]] for key in ("seconds", "bytes")]
        for point, *both in itertools.zip_longest(one["points"], *slopes):
            room  = point["bytes"] / 1e6
            cells = (f"{point['seconds']:.3g}" if point["seconds"] else "",
                     f"{room:.0f} MB" if room >= 100 else f"{room:.3g} MB")
            shown = " | ".join(f"{cell} | {'' if slope is None else f'{slope:.2f}'}"
                               for cell, slope in zip(cells, both, strict=True))
            lines.append(f"| {one['what']} | {point['at']} | {shown} |")
        overall = [f"{one[f'{key}_exponents']['overall']:.2f}" for key in ("seconds", "bytes")]
        lines.append(f"| {one['what']} | all | | {overall[0]} | | {overall[1]} |")
    return "\n".join(lines)


def plot(name: str, result: dict[str, Any]) -> None:
    """docs/images/scaling-NAME.svg, on logarithmic axes; a grey line shows proportion."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "ldm", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt
    found = result["scaling"]
    figure, axes = plt.subplots(2, len(found), figsize=(3.4 * len(found), 5.2), squeeze=False)
    for column, one in zip(axes.T, found, strict=True):
        for axis, key, unit, colour in zip(column, ("seconds", "bytes"), (1, 1e6), ("#0072B2", "#D55E00"),
                                           strict=True):
            x, y = zip(*((p["at"], p[key] / unit) for p in one["points"] if p[key]), strict=True)
            power = 2 if "pixels" in one["what"] else 1
            axis.plot(x, [y[0] * (at / x[0]) ** power for at in x], color="0.8", label=f"exponent {power}")
            axis.plot(x, y, "o-", color=colour, markersize=4,
                      label=f"measured, {one[f'{key}_exponents']['overall']:.2f}")
            axis.set(xscale="log", yscale="log", ylabel="seconds" if key == "seconds" else "memory in MB")
            axis.set_xticks(x, map(str, x))
            axis.minorticks_off()
            axis.legend(frameon=False)
        column[0].set_title(", ".join(one["what"].split(", ")[1:]), fontsize=9)
        column[1].set_xlabel(one["what"].split(", ")[0])
    figure.tight_layout()
    figure.savefig(IMAGES / f"scaling-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def counted_table(found: dict[str, dict[str, float]]) -> str:
    lines = ["| counted | TFLOP | parameters |", "|---|---|---|"]
    lines += [f"| {name} | {one['flops'] / 1e12:.2f} | {one['parameters'] / 1e6:.0f} M |"
              for name, one in found.items()]
    return "\n".join(lines)


def evaluations_table(result: dict[str, Any]) -> str:
    """What scripts/evaluations.py found."""
    lines = ["![RMS error of the latents over evaluations of the network, for each scheduler]"
             "(images/evaluations.png)", "",
             "| | RMS error of the latents | seconds a picture | pairs drawn as asked |", "|---|---|---|---|"]
    lines += [f"| {one['way']} | {one['error']:.4f} | {one['seconds']:.3f} | {one['right']} of {one['of']} |"
              for one in result["savings"]]
    return "\n".join(lines)


def page(text: str) -> str:
    """docs/speed.md with all tables between marks made again from their JSON; one without says so."""
    parts = text.split("<!-- table ")
    for i, part in enumerate(parts[1:], start=1):
        name, rest = part.split(" -->", 1)
        _, after   = rest.split("<!-- end -->", 1)
        file = RESULTS / f"{name}.json"
        if name == "counted":
            table = counted_table(counts())
        elif file.exists():
            found = json.loads(file.read_text("utf-8"))
            table = evaluations_table(found) if name == "evaluations" else tables(name, found)
        else:
            table = "*Not measured yet; the command above fills this table.*"
        parts[i] = f"{name} -->\n{table}\n<!-- end -->{after}"
    return "<!-- table ".join(parts)


# ── Command line ────────────────────────────────────────────────────────────────────────────────────────────

def parts(args: argparse.Namespace, clock: Clock, result: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What can be measured: name → function → pairs of a list in the JSON and what belongs into it."""
    device, quick, rate = args.device, args.quick, result["rates"]
    peak   = peak_of(rate)
    dtype  = getattr(torch, result["dtype"])
    flops  = {name: one["flops"] for name, one in result["counted"].items()}
    step   = flops["SD 1.5, one call with guidance"]
    decode = flops["decode, 512 × 512"]
    rounds = {"step": 2 if quick else 6, "decode": 20 if device == "cuda" else 2 if quick else 5}
    common = {
        "decode":  lambda: ("rows", [one_decode(clock, dtype, rounds["decode"], peak, decode, quick)]),
        "memory":  lambda: ("memory", memory(device, dtype, (512, 1024, 2048))),
        "scaling": lambda: ("scaling", scaling(clock, dtype)),
        "cold":    lambda: ("rows", cold(2 if quick else 5)),
    }
    if device == "cuda":
        xl = flops["SDXL base, one call with guidance"]
        pictures: dict[str, Callable[[], Any]] = {
            f"pictures-{batch}": lambda batch=batch: ("rows", [gpu_pictures("SD 1.5", clock, dtype, batch, 50,
                                                                            5, step, peak)])
            for batch in (1, 4, 16)}
        pictures["pictures-xl"] = lambda: ("rows", [gpu_pictures("SDXL base", clock, dtype, 1, 30, 5, xl,
                                                                 peak)])
        return {**pictures, **common}
    return {"step":    lambda: ("rows", on_a_cpu(one_step, clock, rounds["step"], rate, step, quick)),
            **common,
            "decode":  lambda: ("rows", on_a_cpu(one_decode, clock, rounds["decode"], rate, decode, quick)),
            "compiled": lambda: ("rows", on_a_cpu(compiled_step, clock, 4, rate, step, quick)),
            "changes": lambda: ("changes", changes(clock, 9)),
            "loading": lambda: ("rows", loading(args.folder, 3)),
            **({"original": lambda: ("rows", [original_step(clock, 6, peak, step, args.original)])}
               if args.original else {})}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", nargs="+", metavar="NAME", help=(
        "step, decode, memory, scaling, cold, compiled, changes, loading; on a GPU pictures-1, pictures-4, "
        "pictures-16 and pictures-xl instead of step, compiled, changes and loading"))
    parser.add_argument("--original", type=Path, metavar="FOLDER", help=(
        "with the code of CompVis/stable-diffusion: measures the part `original` too"))
    parser.add_argument("--peak", nargs=3, metavar=("CONTESTANT", "FAMILY", "BATCH"), help=(
        "print the bytes that one contestant takes from the GPU"))
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", help="of the JSON file (default: cpu-quick, cpu or cuda)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ldm-random-sd15",
                        help="where the random model for the loading test lies, or is written (4.3 GB)")
    args = parser.parse_args()
    if args.tables:
        PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
        for file in RESULTS.glob("*.json"):
            if "scaling" in (found := json.loads(file.read_text("utf-8"))):
                plot(file.stem, found)
        return 0
    if args.peak:
        name, family, batch = args.peak
        print(gpu_peak(name, family, torch.float16, int(batch)))
        return 0
    torch.set_num_threads(args.threads)
    clock = Clock(args.device)
    here  = machine(args.device, clock.name)
    file  = RESULTS / f"{args.name or (args.device + ('-quick' if args.quick else ''))}.json"
    if args.part and file.exists():
        result = json.loads(file.read_text("utf-8")) | {"counted": counts()}
        if differs := [key for key in here if key != "date" and here[key] != result["machine"][key]]:
            parser.error(f"{file.name} is of another machine ({', '.join(differs)}): give another --name")
        result["machine"]["date"] = days(result["machine"]["date"], here["date"])
    else:
        result = {"machine": here, "counted": counts(), "rates": {}, "spent": {"start": 0.0}}
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    found = rates(clock, dtype)                                # the best of all runs: what the machine can
    if args.device == "cpu" and native_bfloat16():
        found["bfloat16"] = peak_of(rates(clock, torch.bfloat16))
    result["dtype"] = str(dtype).removeprefix("torch.")
    result["rates"] = {key: max(rate, result["rates"].get(key, 0)) for key, rate in found.items()}
    result["spent"]["start"] = time.perf_counter() - START
    print(json.dumps({key: result[key] for key in ("machine", "counted", "rates")}, indent=2), flush=True)
    known = parts(args, clock, result)
    if unknown := {*(args.part or ())} - {*known}:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in args.part or (QUICK if args.quick and args.device == "cpu" else known):
        start = time.perf_counter()
        key, new = known[name]()
        kept = [one for one in result.get(key, []) if one["what"] not in {one["what"] for one in new}]
        result[key] = kept + new
        result["spent"][name] = time.perf_counter() - start
        file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"written: {file}; {sum(result['spent'].values()):.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
