"""Fewer evaluations of the deep levels: what they said some steps ago is still nearly right."""
from copy import copy
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..models import UNet
from ..models.unet import Level
from .trees import Remembers, replaced


def deep_cache(unet: UNet, every: int = 3, layers: int = 1) -> nn.Module:
    """A U-Net of which only every n-th call is whole; the others renew the outermost layers. *Not exact.*

    DeepCache (Ma et al. 2023): from step to step the features of the lower levels change little, so they are
    remembered, and joined to fresh ones at the full resolution. docs/speed.md has what it costs in accuracy.

    every:  calls from one whole one to the next. 1: all are whole. A time above that of the last call begins
            a new run, with a whole one.
    layers: how many layers of the first level are renewed on the way down; one more on the way up.
    """
    if every < 1 or not 0 <= layers <= unet.config.layers or len(unet.down_blocks) < 2:
        raise ValueError(f"every is {every} and layers {layers}; every is at least 1, layers from 0 to the "
                         f"{unet.config.layers} of a level, and there must be two levels.")
    return _DeepCache(unet, every, layers)


class _DeepCache(Remembers):
    def __init__(self, unet: UNet, every: int, layers: int):
        super().__init__()
        config, memory = unet.config, _Memory()
        first, last    = cast(Level, unet.down_blocks[0]), cast(Level, unet.up_blocks[-1])
        # Where the kept map is read: after the last layer up that `outer` lacks, or the upsampler before it.
        level, index   = len(unet.up_blocks) - 1, config.layers - layers - 1
        path  = (f"up_blocks.{level - 1}.upsamplers.0" if index < 0 else
                 f"up_blocks.{level}.{'attentions' if last.attentions else 'resnets'}.{index}")
        outer = copy(unet)
        outer.config   = replace(config, layers=layers)
        outer._modules = {**unet._modules, "mid_block": memory,
                          "down_blocks": nn.ModuleList([_cut(first, slice(layers))]),
                          "up_blocks":   nn.ModuleList([_cut(last, slice(config.layers - layers, None))])}
        self.config, self.every, self.memory = config, every, memory
        self.whole = replaced(unet, path, _Kept(unet.get_submodule(path), memory))
        self.outer = outer
        self.known = WeakIdKeyDictionary()                      # context → (time, shape, age, deep features)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None,
                guidance: Tensor | None = None) -> Tensor:
        time = float(t.max())
        before, shape, age, deep = self.known.get(context, (time, None, 0, None))
        fresh = shape == x.shape and time <= before and age + 1 < self.every
        self.memory.deep = deep if fresh else None
        out = (self.outer if fresh else self.whole)(x, t, context, vector, guidance)
        self.known[context] = time, x.shape, age + 1 if fresh else 0, self.memory.deep
        return cast(Tensor, out)


class _Memory(nn.Module):
    """In place of all that lies below the outermost layers: a middle that answers with what it was told."""
    deep: Tensor | None = None
    resnets = (None, lambda x, time: x)

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return cast(Tensor, self.deep)


class _Kept(nn.Module):
    """A layer that also leaves its result in the memory."""

    def __init__(self, part: nn.Module, memory: _Memory):
        super().__init__()
        self.part, self.memory = part, memory

    def forward(self, *args: Any) -> Tensor:
        self.memory.deep = self.part(*args)
        return self.memory.deep


def _cut(level: Level, part: slice) -> Level:
    cut = Level()
    cut.resnets, cut.attentions = level.resnets[part], level.attentions[part]
    return cut
