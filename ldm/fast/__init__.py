"""Faster, or in less memory: functions module → module and pipeline → pipeline, applied from outside.

    pipeline = ldm.fast.optimize(ldm.load("…"))

Nothing imports this package, and the networks know nothing of it. No function changes its argument: it
returns a new tree of modules over the same weights, or copies in another layout. Unless its docstring says
otherwise, results are equal to rounding. What each gains, and what was tried and gained nothing, is in
docs/speed.md.

    trees     the same weights in another tree: what all the others are made with
    prompts   a prompt's keys and values once a run
    kernels   kernels, layouts and memory that suit the machine better
    caching   deep features that serve several steps
    strips    the autoencoder on a few rows at a time
    visits    models larger than the GPU
"""
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..models import UNet
from ..pipeline import Pipeline
from .caching import deep_cache
from .kernels import channels_last, graphed, in_place, packed, unfused
from .prompts import prompt_once
from .strips import tiled
from .trees import rebuilt, replaced
from .visits import offload

__all__ = ["channels_last", "deep_cache", "graphed", "in_place", "offload", "optimize", "packed",
           "prompt_once", "rebuilt", "replaced", "tiled", "unfused"]


def optimize(pipeline: Pipeline, *, compile: bool = False) -> Pipeline:
    """The pipeline with all that is faster on its device and changes nothing but rounding; for inference.

    On the CPU `in_place`, `packed`, `channels_last` and `prompt_once`, and `unfused` in bfloat16 with
    AVX512-BF16 and no AMX; on CUDA `channels_last`, `graphed` and `prompt_once`. `packed` and `channels_last`
    copy the weights of convolutions; the old ones are freed with the old pipeline.

    compile: put U-Net and decoder through torch.compile too; on the CPU instead of `packed`, `channels_last`
             and `unfused`, and slower than these where it was measured. It takes minutes at the first call,
             and again for each new size; it needs a C++ compiler, and Triton on CUDA.
    """
    unet, vae = pipeline.unet, pipeline.vae
    if not isinstance(unet, UNet):
        raise TypeError(f"optimize works on the U-Net of ldm; this pipeline has a {type(unet).__name__}.")
    kind   = pipeline.device.type
    around: list[Any] = [torch.compile] * compile + [graphed] * (kind == "cuda")
    if kind == "cpu":
        unet = in_place(unet)
        if not compile:                                     # the compiler cannot read packed weights
            unet, vae = channels_last(packed(unet)), channels_last(vae)
            if next(unet.parameters()).dtype == torch.bfloat16 and _attends_slowly():
                unet = unfused(unet)
    elif kind == "cuda":
        unet, vae = channels_last(unet), channels_last(vae)
    if compile:
        vae = replaced(vae, "decoder", cast(nn.Module, torch.compile(vae.decoder)))
    return replace(pipeline, unet=prompt_once(unet, *around), vae=vae)


def _attends_slowly() -> bool:
    """Whether `unfused` helps on this CPU. Older versions of PyTorch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") and not can.get("amx_bf16"))
