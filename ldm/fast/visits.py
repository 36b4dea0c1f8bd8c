"""Models larger than the GPU: their parts stay elsewhere, and visit it one at a time."""
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..denoiser import Conditioning
from ..pipeline import Pipeline
from ..text import ClipText, JoinedText
from .kernels import Graphed, PackedConv
from .trees import Module, rebuilt


def offload(pipeline: Pipeline, device: torch.device | str, *, layerwise: bool = False) -> Pipeline:
    """A pipeline whose weights stay where they are, usually on the CPU, and visit `device` when needed.

    One part at a time: text encoders, U-Net, encoder or decoder. So the device needs room for the largest
    only; the U-Net and the text encoders travel once a run, the decoder once for each picture. A refiner is
    offloaded by itself, and then there are two visitors. Noise and pictures are where the weights are.

    layerwise: the U-Net visits layer by layer, in every call: slow, but there needs to be room for one layer.
    """
    if any(isinstance(part, (Graphed, PackedConv)) for part in getattr(pipeline.unet, "modules", list)()):
        raise ValueError("What is recorded as a CUDA graph, or packed for a CPU, cannot move: give offload a "
                         "pipeline that fast.optimize, graphed and packed have not changed.")
    room = Room(torch.device(device))
    unet = cast(nn.Module, pipeline.unet)
    inside = (rebuilt(unet, lambda part: _Visitor(part, room) if part._parameters else None)
              if layerwise else _Visitor(unet, room))            # a layer is what has weights itself
    vae  = copy(pipeline.vae)
    vae._modules = {name: None if part is None else _There(_Visitor(part, room), room.device)
                    for name, part in vae._modules.items()}
    return replace(pipeline, text=_text(pipeline.text, room), vae=vae,
                   unet=_There(inside, room.device, getattr(unet, "config", None)))


@dataclass
class Room:
    """A device with room for one guest at a time."""
    device: torch.device
    host: nn.Module | None  = None
    guest: nn.Module | None = None

    def admit(self, part: Module) -> Module:
        """The part on the device; the one before it is dropped there, its weights never left home."""
        if part is not self.host:
            self.host = self.guest = None
            self.guest = moved(part, self.device)
            self.host  = part
        return cast(Module, self.guest)


def moved(module: Module, device: torch.device) -> Module:
    """The same tree over copies of the tensors on the device."""
    twin = rebuilt(module, lambda part: None)
    for part in twin.modules():
        part._parameters = {name: tensor if tensor is None else
                            nn.Parameter(tensor.to(device, non_blocking=True), tensor.requires_grad)
                            for name, tensor in part._parameters.items()}
        part._buffers = {name: tensor if tensor is None else tensor.to(device, non_blocking=True)
                         for name, tensor in part._buffers.items()}
    return twin


class _Visitor(nn.Module):
    """A part that visits the room for its calls."""

    def __init__(self, part: nn.Module, room: Room):
        super().__init__()
        self.part, self.room = part, room

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.room.admit(self.part)(*args, **named)


class _There(nn.Module):
    """A network that is called on the device, and whose result comes back to where its first argument is."""

    def __init__(self, network: nn.Module, device: torch.device, config: Any = None):
        super().__init__()
        self.network, self.device, self.config = network, device, config

    def forward(self, *args: Any, **named: Any) -> Tensor:
        there = tree_map_only(Tensor, lambda tensor: tensor.to(self.device), (args, named))
        return cast(Tensor, self.network(*there[0], **there[1]).to(args[0].device))


def _text(text: Callable[[Sequence[str]], Conditioning],
          room: Room) -> Callable[[Sequence[str]], Conditioning]:
    """Text encoders that visit the room, all of a pipeline at once; a text of another kind stays."""
    if not isinstance(text, ClipText | JoinedText):
        return text
    encoders = [text] if isinstance(text, ClipText) else [text.first, text.second]
    models   = nn.ModuleList([encoder.model for encoder in encoders])

    def visiting(prompts: Sequence[str]) -> Conditioning:
        here = [replace(encoder, model=cast(Any, model))
                for encoder, model in zip(encoders, room.admit(models), strict=True)]
        return (here[0] if len(here) == 1 else JoinedText(*here))(prompts)
    return visiting
