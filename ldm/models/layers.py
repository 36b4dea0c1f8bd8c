"""The parts that the U-Net and the autoencoder are made of.

Shapes: N batch, C channels, h × w spatial, L = h·w positions of a picture, S positions of the context (77 for
a CLIP prompt), D width of the context.
"""
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Fourier features of a scalar: (N,) → (N, width), in float32; width is even.

    Ho et al. 2020 (DDPM) take the position encoding of Vaswani et al. 2017, section 3.5: wavelengths from 2π
    to almost 10000·2π in geometric progression. Stable Diffusion puts the cosines first.
    """
    half        = width // 2
    index       = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * index / half)
    angles      = t[:, None].float() * frequencies                                            # (N, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Fourier features of a guidance scale, 1 is none: (N,) → (N, width), in float32; width is even.

    What latent consistency models (Luo et al. 2023) are told besides the time: their w is the scale − 1, and
    multiplied by 1000. Unlike in `timestep_embedding`, the sines come first, and the last wavelength is
    10000·2π.
    """
    half        = width // 2
    index       = torch.arange(half, dtype=torch.float32, device=scale.device)
    frequencies = torch.exp(-math.log(10000) * index / (half - 1))
    angles      = 1000 * (scale[:, None].float() - 1) * frequencies                           # (N, width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeMLP(nn.Module):
    """Two linear layers with a SiLU between them: an embedding (N, in) → (N, out).

    A second embedding (N, more) is projected and added to the first, where the weights have a place for it.
    """

    def __init__(self, in_width: int, out_width: int, more_width: int | None = None):
        super().__init__()
        self.linear_1  = nn.Linear(in_width, out_width)
        self.linear_2  = nn.Linear(out_width, out_width)
        self.cond_proj = nn.Linear(more_width, in_width, bias=False) if more_width else None

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and more is not None:
            x = x + self.cond_proj(more)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Residual block: (N, C, h, w) → (N, C', h, w), shifted by the time embedding (N, E) where there is one.

    He et al. 2016, in DDPM's pre-activation form: (GroupNorm, SiLU, 3×3 convolution) twice beside the skip.
    """

    def __init__(self, in_channels: int, out_channels: int, time_width: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels) if time_width else None
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width with a strided convolution.

    The U-Net pads all four sides by one; the autoencoder pads right and below only (`padding=0`), as its
    original code did, and its weights were trained so.
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv    = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour resize to `size` (h, w), then a convolution that smooths the steps."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, Eq. 1): softmax(QKᵀ/√d)·V with H heads of width d.

    Queries come from x (N, L, C), keys and values from the context (N, S, D), or from x itself when there is
    none. The result is like x.
    """

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads  = heads
        self.to_q   = nn.Linear(channels, channels, bias=False)
        self.to_k   = nn.Linear(context_dim, channels, bias=False)
        self.to_v   = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])    # a list, as checkpoints say to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)                      # (N, H, L or S, d)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        # QKᵀ of Stable Diffusion 2.1 exceeds the range of float16, which its config calls `upcast_attention`.
        # PyTorch's kernels for the CPU and CUDA sum it in float32, that for MPS in the type of q and k.
        if q.device.type == "mps":
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v).to(x.dtype)                         # (N, H, L, d)
        return self.to_out[0](out.transpose(1, 2).flatten(2))                             # (N, L, C)


class GEGLU(nn.Module):
    """GELU(xW + b) ⊙ (xV + c), both products in one layer: V and c first, W and b second.

    Shazeer 2020, "GLU Variants Improve Transformer", section 2.
    """

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(in_width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The position-wise network of a transformer block, four times as wide inside."""

    def __init__(self, channels: int):
        super().__init__()
        # net.1 was a dropout in the original; checkpoints still count it: net.0 and net.2 have weights.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(),
                                  nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward: each on a LayerNorm, added to x."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff    = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))                                               # (N, L, C) throughout
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the positions of a feature map (N, C, h, w), with a context (N, S, D).

    Rombach et al. 2022 ("latent diffusion"), section 3.3: here the text enters the picture. SD 1.x projects
    in and out with 1×1 convolutions, SD 2.x and XL with linear layers: the same arithmetic, stored as 4-D or
    2-D weights. The result is like x.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int, groups: int, linear: bool):
        super().__init__()
        def projection() -> nn.Module:
            return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.linear   = linear
        self.norm     = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in  = projection()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = projection()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y = self.norm(x)
        if self.linear:
            y = self.proj_in(y.flatten(2).transpose(1, 2))                                     # (N, L, C)
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2).contiguous()     # the blocks read along C
        for block in self.transformer_blocks:
            y = block(y, context)
        if self.linear:
            y = self.proj_out(y).transpose(1, 2).unflatten(2, (h, w))                          # (N, C, h, w)
        else:
            y = self.proj_out(y.transpose(1, 2).unflatten(2, (h, w)))
        return x + y


def check_hf(config: dict[str, Any], supported: dict[str, Any], model: str) -> None:
    """Raises ValueError for the first field of a Hugging Face config with a value not implemented here.

    A field that is missing or null has diffusers' default, which is the supported value.
    """
    for field, value in supported.items():
        found = config.get(field)
        found = list(found) if isinstance(found, tuple) else found      # JSON has lists, diffusers tuples
        if found not in (None, value):
            raise ValueError(f"{model}: config.json has {field} = {found!r}, but only {value!r} is "
                             f"implemented. This is another architecture than Stable Diffusion 1.x, 2.x or "
                             f"XL; the file cannot be used with ldm.")
