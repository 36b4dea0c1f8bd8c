"""The same layers in kernels, layouts and memory that suit the machine better."""
from copy import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..models.layers import GEGLU, Attention
from .trees import Module, Remembers, rebuilt, refuse_gradients

WIDE   = 1280 * 640 * 9     # weights of a 3×3 convolution from which `packed` gains
SCORES = 2**21              # of attention, computed at a time: in bfloat16 4 MB, which stay in the caches


def in_place(module: Module) -> Module:
    """A network whose GEGLUs, at which its memory peaks, write over what is not needed any more.

    On a CPU a fresh large tensor costs more than the arithmetic on it: its pages must be mapped and zeroed.
    """
    return rebuilt(module, lambda part: _as(_InPlaceGEGLU, part) if type(part) is GEGLU else None)


def _as(kind: type[nn.Module], part: nn.Module) -> nn.Module:
    """The same layer, over the same weights, with the forward of a subclass."""
    twin = copy(part)
    twin.__class__ = kind
    return twin


class _InPlaceGEGLU(GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)


def unfused(module: Module) -> Module:
    """A network whose attention is two matrix products and a softmax, some rows of the scores at a time.

    For bfloat16 on CPUs with AVX512-BF16 and without AMX: there PyTorch's fused kernel multiplies small tiles
    at a fraction of the rate of large products. It keeps its scores in float32; here they are rounded.
    """
    return rebuilt(module, lambda part: _as(UnfusedAttention, part) if type(part) is Attention else None)


class UnfusedAttention(Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)      # (N·H, L or S, d)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        heads = max(1, SCORES // (q.shape[1] * k.shape[1]))                             # at a time
        rows  = max(1, SCORES // (heads * k.shape[1]))
        out   = torch.cat([torch.cat([_attend(some, k, v) for some in q.split(rows, 1)], 1)
                           for q, k, v in zip(q.split(heads), k.split(heads), v.split(heads), strict=True)])
        return cast(Tensor, self.to_out[0](out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ/√d)·V; the root is taken within the product, before its rounding."""
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -.5)
    return scores.softmax(-1) @ v


def packed(module: Module) -> Module:
    """A network whose wide convolutions keep their weights as oneDNN's kernels want them; CPU, for inference.

    PyTorch rearranges the weights in every call. On the low levels of a U-Net, where they are larger than the
    feature maps, this is up to two thirds of the time. The rearranged ones have memory of their own; the
    plain ones are freed when the old module goes. Where PyTorch cannot do it, convolutions stay as they are.
    """
    def rule(part: nn.Module) -> nn.Module | None:
        if not (isinstance(part, nn.Conv2d) and part.weight.numel() >= WIDE and part.padding_mode == "zeros"):
            return None
        try:
            return PackedConv(part)
        except (AttributeError, RuntimeError):      # without these private operators, or not for this dtype
            return None
    return rebuilt(module, rule)


class PackedConv(nn.Module):
    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.layout   = conv.padding, conv.stride, conv.dilation, conv.groups
        self.bias     = conv.bias
        self.convolve = torch.ops.mkldnn._convolution_pointwise
        reorder       = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.weight   = cast(Any, reorder)(conv.weight.detach().to_mkldnn(), *self.layout)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(self, "packed", x)
        x = x.contiguous(memory_format=torch.channels_last)
        return cast(Tensor, self.convolve(x, self.weight, self.bias, *self.layout, "none", [], ""))


def channels_last(module: Module) -> Module:
    """A network whose 4-D weights lie with the channels last, as a GPU's tensor cores and some CPUs read them
    faster. They are copies, with memory of their own. Its norms are of `CentredGroupNorm`."""
    def rule(part: nn.Module) -> nn.Module | None:
        if type(part) is nn.GroupNorm:
            return _as(CentredGroupNorm, part)
        if not isinstance(part, nn.Conv2d):
            return None
        conv   = copy(part)
        weight = part.weight.detach().contiguous(memory_format=torch.channels_last)
        conv._parameters = {**part._parameters, "weight": nn.Parameter(weight, part.weight.requires_grad)}
        return conv
    return rebuilt(module, rule)


class CentredGroupNorm(nn.GroupNorm):
    """For channels last on a CPU, where PyTorch takes the variance as E[x²] − E[x]², which loses it when the
    mean is large beside it. Each group is moved near a mean of 0 first, by that of every eighth pixel of each
    eighth row, which costs little and changes no norm."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.ndim == 4:
            means = x[:, :, ::8, ::8].unflatten(1, (self.num_groups, -1)).mean((2, 3, 4))           # (N, G)
            x     = x - means.repeat_interleave(x.shape[1] // self.num_groups, dim=1)[:, :, None, None]
        return super().forward(x)


def graphed(network: nn.Module) -> nn.Module:
    """A network whose kernels are recorded once for each set of shapes, then replayed; CUDA, for inference.

    A call of SD 1.5's U-Net has about a thousand kernels; at batch 1, a fast GPU waits for Python to name
    them. The memory of a recording is kept until the module goes. Weights must neither move nor be replaced.

    ValueError: the network remembers something between its calls, which a recording would repeat for ever. Of
    `prompt_once` take it inside: `prompt_once(unet, graphed)`.
    """
    if remembers := [type(part).__name__ for part in network.modules() if isinstance(part, Remembers)]:
        raise ValueError(f"graphed would record what {remembers[0]} remembers of one prompt or step; record "
                         f"the network inside, prompt_once(unet, graphed). deep_cache cannot be recorded.")
    return Graphed(network)


class Graphed(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.config  = getattr(network, "config", None)
        self.records: dict[Any, tuple[nn.Module, torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def forward(self, *args: Any, **named: Any) -> Tensor:
        leaves, tree = tree_flatten((args, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        refuse_gradients(self, "graphed", *tensors)
        with torch.inference_mode():            # for a recording may be made inside of it, and used outside
            output = self._replayed(leaves, tree, tensors)
        return output.clone()

    def _replayed(self, leaves: list[Any], tree: Any, tensors: list[Tensor]) -> Tensor:
        key = id(self.network), str(tree), *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf
                                             for leaf in leaves)
        if key not in self.records:             # it keeps the network, so that no other gets its id
            self.records[key] = self.network, *self._record(leaves, tree)
        _, graph, inputs, output = self.records[key]
        for dtype in {tensor.dtype for tensor in tensors}:              # one kernel for each
            torch._foreach_copy_([tensor for tensor in inputs if tensor.dtype == dtype],
                                 [tensor for tensor in tensors if tensor.dtype == dtype])
        graph.replay()
        return output

    def _record(self, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, named = tree_unflatten(leaves, tree)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with torch.cuda.device(inputs[0].device):       # a stream belongs to one device
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):              # libraries choose their kernels in the first calls
                for _ in range(3):
                    self.network(*args, **named)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # cuBLAS has one workspace for all: the recording needs one of its own, which nobody else frees.
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.graph(graph, stream=aside):
                output = self.network(*args, **named)
            torch._C._cuda_clearCublasWorkspaces()
        return graph, inputs, output
