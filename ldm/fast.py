"""Faster, or in less memory: functions module → module and pipeline → pipeline, applied from outside.

    pipeline = ldm.fast.optimize(ldm.load("…"))

Nothing imports this file, and the networks know nothing of it. No function changes its argument: it returns a
new tree of modules over the same weights. Unless its docstring says otherwise, results are equal to rounding.
What each gains, and what was tried and gained nothing, is in docs/speed.md.
"""
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from .denoiser import Conditioning
from .models import VAE, UNet
from .models.layers import GEGLU, ResBlock, TransformerBlock
from .models.unet import Level
from .models.vae import Decoder, Encoder
from .pipeline import Pipeline
from .text import ClipText, JoinedText

__all__ = ["deep_cache", "graphed", "in_place", "offload", "optimize", "packed", "prompt_once", "rebuilt",
           "replaced", "tiled"]

Module = TypeVar("Module", bound=nn.Module)

WIDE = 1280 * 640 * 9       # weights of a 3×3 convolution from which `packed` gains


def rebuilt(module: Module, rule: Callable[[nn.Module], nn.Module | None]) -> Module:
    """The same tree of modules over the same tensors; but rule(child), where not None, for each child. What
    stands in two places of the tree is one module in the new one, too."""
    known: dict[int, nn.Module] = {}

    def made(part: nn.Module) -> nn.Module:
        if id(part) not in known:
            known[id(part)] = rule(part) or copied(part)
        return known[id(part)]

    def copied(part: nn.Module) -> nn.Module:
        twin = copy(part)
        twin._modules = {name: child and made(child) for name, child in part._modules.items()}
        return twin
    return cast(Module, copied(module))


def replaced(module: Module, path: str, child: nn.Module) -> Module:
    """The same tree over the same tensors, with `child` at a path such as "mid_block.attentions.0"."""
    name, _, rest = path.partition(".")
    twin = copy(module)
    twin._modules = {**module._modules,
                     name: replaced(module.get_submodule(name), rest, child) if rest else child}
    return twin


def optimize(pipeline: Pipeline, *, compile: bool = False) -> Pipeline:
    """The pipeline with all that is faster on its device and changes nothing but rounding; for inference.

    On the CPU `packed`, `in_place` and `prompt_once`; on CUDA channels_last, `graphed` and `prompt_once`.

    compile: put U-Net and decoder through torch.compile too, instead of `packed`. It takes minutes at the
             first call, and again for each new size; it needs a C++ compiler, and Triton on CUDA.
    """
    unet, vae = pipeline.unet, pipeline.vae
    if not isinstance(unet, UNet):
        raise TypeError(f"optimize works on the U-Net of ldm; this pipeline has a {type(unet).__name__}.")
    kind   = pipeline.device.type
    around: list[Any] = [torch.compile] * compile + [graphed] * (kind == "cuda")
    if kind == "cpu":
        unet = in_place(unet)
        unet = unet if compile else packed(unet)            # the compiler cannot read packed weights
    elif kind == "cuda":
        unet, vae = _channels_last(unet), _channels_last(vae)
    if compile:
        vae = replaced(vae, "decoder", cast(nn.Module, torch.compile(vae.decoder)))
    return replace(pipeline, unet=prompt_once(unet, *around), vae=vae)


# ── The prompt, once a run ──────────────────────────────────────────────────────────────────────────────────

def prompt_once(unet: UNet, *around: Callable[[nn.Module], nn.Module]) -> "PromptOnce":
    """A U-Net that projects a context to keys and values in its first call, and remembers them for the next.

    They are the same for all steps of a run: 1 % or less of the work, but 32 of SD 1.5's kernels. They are
    remembered for the tensor itself, and forgotten with it. A context that is changed in place is noticed;
    but under `torch.inference_mode` tensors keep no versions: there, make a new one.

    around: what to wrap about the network inside, whose context is the list of keys and values.
    """
    return PromptOnce(unet, around)


class PromptOnce(nn.Module):
    """See `prompt_once`."""

    def __init__(self, unet: UNet, around: Iterable[Callable[[nn.Module], nn.Module]]):
        super().__init__()
        questions: list[nn.Module] = []

        def rule(part: nn.Module) -> nn.Module | None:
            if not isinstance(part, TransformerBlock):
                return None
            for name in ("to_k", "to_v"):
                questions.append(part.get_submodule(f"attn2.{name}"))
                part = replaced(part, f"attn2.{name}", _Answer(len(questions) - 1))
            return part

        network: nn.Module = rebuilt(unet, rule)
        for wrap in around:
            network = wrap(network)
        self.config    = unet.config
        self.network   = network
        self.questions = nn.ModuleList(questions)
        self.known     = WeakIdKeyDictionary()          # context → (state, answers)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *rest: Any, **named: Any) -> Tensor:
        return cast(Tensor, self.network(x, t, self.answers(context), *rest, **named))

    def answers(self, context: Tensor) -> list[Tensor]:
        """For each cross-attention the keys and the values, (N, S, C) each."""
        state = [torch.is_inference_mode_enabled(),     # what was made there cannot be part of a graph
                 *(None if tensor.is_inference() else tensor._version
                   for tensor in (context, *self.questions.parameters()))]
        known, answers = self.known.get(context, (None, []))
        if known != state:
            answers = [project(context) for project in self.questions]
            if not any(answer.requires_grad for answer in answers):                 # a graph serves once
                self.known[context] = state, answers
        return answers


class _Answer(nn.Module):
    """In place of a projection of the context: picks its result out of all results."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, answers: Sequence[Tensor]) -> Tensor:
        return answers[self.index]


# ── Kernels ─────────────────────────────────────────────────────────────────────────────────────────────────

def in_place(module: Module) -> Module:
    """A network whose GEGLUs, at which its memory peaks, write over what is not needed any more.

    On a CPU a fresh large tensor costs more than the arithmetic on it: its pages must be mapped and zeroed.
    """
    def rule(part: nn.Module) -> nn.Module | None:
        if type(part) is not GEGLU:
            return None
        twin = copy(part)
        twin.__class__ = _InPlaceGEGLU
        return twin
    return rebuilt(module, rule)


class _InPlaceGEGLU(GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)


def packed(module: Module) -> Module:
    """A network whose wide convolutions keep their weights as oneDNN's kernels want them; CPU, for inference.

    PyTorch rearranges the weights in every call. On the low levels of a U-Net, where they are larger than the
    feature maps, this is up to half of the time. The rearranged ones have memory of their own; the plain ones
    are freed when the old module goes. Where PyTorch cannot do it, convolutions stay as they are.
    """
    def rule(part: nn.Module) -> nn.Module | None:
        if not (isinstance(part, nn.Conv2d) and part.weight.numel() >= WIDE and part.padding_mode == "zeros"):
            return None
        try:
            return _PackedConv(part)
        except (AttributeError, RuntimeError):      # without these private operators, or not for this dtype
            return None
    return rebuilt(module, rule)


class _PackedConv(nn.Module):
    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.layout   = conv.padding, conv.stride, conv.dilation, conv.groups
        self.bias     = conv.bias
        self.convolve = torch.ops.mkldnn._convolution_pointwise
        reorder       = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.weight   = cast(Any, reorder)(conv.weight.detach().to_mkldnn(), *self.layout)

    def forward(self, x: Tensor) -> Tensor:
        _refuse_gradients(self, x, "packed")
        x = x.contiguous(memory_format=torch.channels_last)
        return cast(Tensor, self.convolve(x, self.weight, self.bias, *self.layout, "none", [], ""))


def _refuse_gradients(module: nn.Module, x: Tensor, name: str) -> None:
    tensors = x, *module.parameters()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"What fast.{name} makes has no gradients: call it under torch.no_grad(), or use "
                           f"the module that it was made from.")


def _channels_last(module: Module) -> Module:
    """A network whose 4-D weights lie with the channels last, as the tensor cores of a GPU read them."""
    def rule(part: nn.Module) -> nn.Module | None:
        if not isinstance(part, nn.Conv2d):
            return None
        conv   = copy(part)
        weight = part.weight.detach().contiguous(memory_format=torch.channels_last)
        conv._parameters = {**part._parameters, "weight": nn.Parameter(weight, part.weight.requires_grad)}
        return conv
    return rebuilt(module, rule)


def graphed(network: nn.Module) -> nn.Module:
    """A network whose kernels are recorded once for each set of shapes, then replayed; CUDA, for inference.

    A call of SD 1.5's U-Net has about a thousand kernels; at batch 1, a fast GPU waits for Python to name
    them. The memory of a recording is kept until the module goes. Weights must neither move nor be replaced.
    """
    return _Graphed(network)


class _Graphed(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.records: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def forward(self, *args: Any, **named: Any) -> Tensor:
        leaves, tree = tree_flatten((args, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in tensors:
            _refuse_gradients(self, tensor, "graphed")
        with torch.inference_mode():
            return self._replayed(leaves, tree, tensors)

    def _replayed(self, leaves: list[Any], tree: Any, tensors: list[Tensor]) -> Tensor:
        key     = tree, *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in self.records:
            self.records[key] = self._record(leaves, tree)
        graph, inputs, output = self.records[key]
        torch._foreach_copy_(inputs, tensors)
        graph.replay()
        return output.clone()

    def _record(self, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, named = tree_unflatten(leaves, tree)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):              # libraries choose their kernels in the first calls
            for _ in range(3):
                self.network(*args, **named)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.network(*args, **named)
        return graph, [leaf for leaf in leaves if isinstance(leaf, Tensor)], output


# ── Fewer evaluations ───────────────────────────────────────────────────────────────────────────────────────

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


class _DeepCache(nn.Module):
    def __init__(self, unet: UNet, every: int, layers: int):
        super().__init__()
        config, memory = unet.config, _Memory()
        first, last    = cast(Level, unet.down_blocks[0]), cast(Level, unet.up_blocks[-1])
        # The newest feature map that is not renewed: of a layer of the last level up, or of what leads there.
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


# ── The autoencoder in strips ───────────────────────────────────────────────────────────────────────────────

def tiled(vae: VAE, rows: int = 64, store: torch.device | str | None = None) -> VAE:
    """An autoencoder that works on `rows` rows at a time where the picture is large; for inference.

    There are no seams and no shifts of tone: the result is that of the whole picture, to rounding. Every
    strip has gone through a layer before any goes on to the next. So a convolution finds the rows beside its
    strip as they are, and a GroupNorm divides by the statistics of the whole map, taken while it is written.
    Nothing is computed twice. The middle, with its attention over all positions, sees the latents whole.

    At its height the decoder of Stable Diffusion needs three maps of 256 channels and the size of the
    picture; in strips it is one and a half: in float32, 6.7 GB instead of 12.9 for 2048 × 2048 pixels.

    rows:  height of a strip, in rows of the map at hand, whatever its resolution.
    store: where the maps lie between two layers; default: with the weights. "cpu" leaves a GPU with a strip
           and the latents, and costs two transfers of each map.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; a strip has at least one.")
    if not isinstance(vae, VAE):
        raise TypeError(f"tiled works on a VAE; a {type(vae).__name__} needs little memory.")
    strips = _Strips(rows, store)
    return rebuilt(vae, lambda part: (_StripDecoder(part, strips) if isinstance(part, Decoder) else
                                      _StripEncoder(part, strips) if isinstance(part, Encoder) else None))


@dataclass
class _Map:
    """A feature map (N, C, h, w), and for each strip: rows, variance and mean of the channels (N, C)."""
    data: Tensor
    moments: list[tuple[int, Tensor, Tensor]]


@dataclass(frozen=True)
class _Strips:
    rows: int
    store: torch.device | str | None

    def stored(self, x: Tensor) -> _Map:
        """A small map as a stored one."""
        return _Map(x.to(self.store or x.device), [(x.shape[2], *_moments(x))])

    def conv(self, x: _Map, conv: nn.Conv2d, norm: nn.GroupNorm | None = None, *, up: int = 1,
             add: Callable[[int, int], Tensor] | None = None, into: Tensor | None = None) -> _Map:
        """conv(x), or conv(silu(norm(x))), of x enlarged `up` times; plus add(top, bottom), rows of a skip.

        into: memory for the result.
        """
        device, stride, pad = conv.weight.device, conv.stride[0], int(conv.padding[0])
        height, width = x.data.shape[2] * up, x.data.shape[3] * up
        if into is None:
            into = torch.empty(len(x.data), conv.out_channels, height // stride, width // stride,
                               dtype=x.data.dtype, device=x.data.device)
        affine  = _affine(norm, x.moments) if norm else None
        moments = []
        for top in range(0, height // stride, self.rows):
            bottom = min(top + self.rows, height // stride)
            first, last  = top * stride - pad, (bottom - 1) * stride - pad + 3       # rows under the kernel,
            above, below = max(-first, 0), max(last - height, 0)                    # of them outside: zeros
            first, last  = first + above, last - below
            strip = x.data[:, :, first // up:(last - 1) // up + 1].to(device)
            if affine is not None:
                strip = F.silu(torch.addcmul(affine[1], strip, affine[0]), inplace=True).to(strip.dtype)
            if up > 1:
                strip = F.interpolate(strip, scale_factor=up)[:, :, first % up:][:, :, :last - first]
            right = 1 - pad                              # the autoencoder pads so before a stride
            if right or above or below:
                strip = F.pad(strip, (0, right, above, below))
            strip = F.conv2d(strip, conv.weight, conv.bias, stride, (0, pad))
            if add is not None:
                strip += add(top, bottom)
            into[:, :, top:bottom] = strip
            moments.append((bottom - top, *_moments(strip)))
        return _Map(into, moments)

    def resnet(self, block: ResBlock, x: _Map) -> _Map:
        """A ResBlock. The result takes the memory of x, if it fits."""
        def skip(top: int, bottom: int) -> Tensor:
            strip = x.data[:, :, top:bottom].to(block.conv1.weight.device)
            return strip if block.conv_shortcut is None else cast(Tensor, block.conv_shortcut(strip))
        h     = self.conv(x, block.conv1, block.norm1)
        count = block.conv2.out_channels
        return self.conv(h, block.conv2, block.norm2, add=skip,
                         into=x.data[:, :count] if count <= x.data.shape[1] else None)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each channel, (N, C), at least in float32.

    torch.var_mean does this too, but on a CPU it is several times slower.
    """
    x    = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(dim=(2, 3), keepdim=True)
    return torch.linalg.vector_norm(x - mean, dim=(2, 3)) ** 2 / x[0, 0].numel(), mean[:, :, 0, 0]


def _affine(norm: nn.GroupNorm, moments: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The GroupNorm of a whole map as x·scale + shift, (N, C, 1, 1) each.

    The variance of a union is the mean of the variances plus the variance of the means.
    """
    rows, variances, means = zip(*moments, strict=True)
    variance, mean = (torch.stack(one).unflatten(2, (norm.num_groups, -1)) for one in (variances, means))
    weight = torch.tensor(rows, dtype=mean.dtype, device=mean.device)[:, None, None, None] / sum(rows)
    centre = (weight * mean).sum(0).mean(-1)                                                        # (N, G)
    spread = (weight * (variance + (mean - centre[..., None]) ** 2)).sum(0).mean(-1)
    size   = mean.shape[-1]
    scale  = norm.weight * (spread + norm.eps).rsqrt().repeat_interleave(size, dim=1)               # (N, C)
    shift  = norm.bias - centre.repeat_interleave(size, dim=1) * scale
    return scale[:, :, None, None], shift[:, :, None, None]


class _StripDecoder(nn.Module):
    conv_out: nn.Conv2d
    conv_norm_out: nn.GroupNorm

    def __init__(self, decoder: Decoder, strips: _Strips):
        super().__init__()
        self._modules, self.strips = dict(decoder._modules), strips

    def forward(self, z: Tensor) -> Tensor:
        _refuse_gradients(self, z, "tiled")
        conv, resnet = self.strips.conv, self.strips.resnet
        x = self.strips.stored(self.mid_block(self.conv_in(z)))
        for level in self.up_blocks:
            for block in level.resnets:
                x = resnet(block, x)
            if hasattr(level, "upsamplers"):
                x = conv(x, level.upsamplers[0].conv, up=2)
        return conv(x, self.conv_out, self.conv_norm_out).data.to(z.device)


class _StripEncoder(nn.Module):
    conv_in: nn.Conv2d

    def __init__(self, encoder: Encoder, strips: _Strips):
        super().__init__()
        self._modules, self.strips = dict(encoder._modules), strips

    def forward(self, pictures: Tensor) -> Tensor:
        _refuse_gradients(self, pictures, "tiled")
        conv, resnet = self.strips.conv, self.strips.resnet
        x = conv(self.strips.stored(pictures), self.conv_in)
        for level in self.down_blocks:
            for block in level.resnets:
                x = resnet(block, x)
            if hasattr(level, "downsamplers"):
                x = conv(x, level.downsamplers[0].conv)
        z = self.mid_block(x.data.to(pictures.device))
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(z))))


# ── Models larger than the GPU ──────────────────────────────────────────────────────────────────────────────

def offload(pipeline: Pipeline, device: torch.device | str, *, layerwise: bool = False) -> Pipeline:
    """A pipeline whose weights stay where they are, usually on the CPU, and visit `device` when needed.

    One part at a time: text encoders, U-Net, encoder or decoder. So the device needs room for the largest
    only; the U-Net and the text encoders travel once a run, the decoder once for each picture. A refiner is
    offloaded by itself, and then there are two visitors. Noise and pictures are where the weights are.

    layerwise: the U-Net visits layer by layer, in every call: slow, but there needs to be room for one layer.
    """
    if any(isinstance(part, (_Graphed, _PackedConv)) for part in getattr(pipeline.unet, "modules", list)()):
        raise ValueError("What is recorded as a CUDA graph, or packed for a CPU, cannot move: give offload a "
                         "pipeline that fast.optimize, graphed and packed have not changed.")
    room = _Room(torch.device(device))
    unet = cast(nn.Module, pipeline.unet)
    inside = rebuilt(unet, room.layers) if layerwise else _Visitor(unet, room)
    vae  = copy(pipeline.vae)
    vae._modules = {name: part and _There(_Visitor(part, room), room.device)
                    for name, part in vae._modules.items()}
    return replace(pipeline, text=_text(pipeline.text, room), vae=vae,
                   unet=_There(inside, room.device, getattr(unet, "config", None)))


@dataclass
class _Room:
    """A device with room for one guest at a time."""
    device: torch.device
    host: nn.Module | None  = None
    guest: nn.Module | None = None

    def admit(self, part: Module) -> Module:
        """The part on the device; the one before it is dropped there, its weights never left home."""
        if part is not self.host:
            self.host = self.guest = None
            self.guest = _moved(part, self.device)
            self.host  = part
        return cast(Module, self.guest)

    def layers(self, part: nn.Module) -> nn.Module | None:
        """A rule for `rebuilt`: a visitor for each layer that has weights of its own."""
        return _Visitor(part, self) if part._parameters else None


def _moved(module: Module, device: torch.device) -> Module:
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

    def __init__(self, part: nn.Module, room: _Room):
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
          room: _Room) -> Callable[[Sequence[str]], Conditioning]:
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
