"""The autoencoder in strips: half of the memory, the same picture."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import VAE
from ..models.layers import ResBlock
from ..models.vae import Decoder, Encoder
from .trees import rebuilt, refuse_gradients


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
        refuse_gradients(self, "tiled", z)
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
        refuse_gradients(self, "tiled", pictures)
        conv, resnet = self.strips.conv, self.strips.resnet
        x = conv(self.strips.stored(pictures), self.conv_in)
        for level in self.down_blocks:
            for block in level.resnets:
                x = resnet(block, x)
            if hasattr(level, "downsamplers"):
                x = conv(x, level.downsamplers[0].conv)
        z = self.mid_block(x.data.to(pictures.device))
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(z))))
