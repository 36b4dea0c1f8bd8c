"""The autoencoder: pictures (N, 3, H, W) ⇄ latents (N, 4, H/8, W/8).

    encoder   conv_in ─ level 0 ↓ level 1 ↓ level 2 ↓ level 3 ─ mid ─ conv_out ─ quant_conv ─▶ mean, log σ²
    decoder   post_quant_conv ─ conv_in ─ mid ─ level 3 ↑ level 2 ↑ level 1 ↑ level 0 ─ conv_out ─▶ picture

mid is ResBlock, self-attention over all positions, ResBlock. Level i has C_i channels. With four levels one
latent pixel stands for 8 × 8 pixels of the picture.

Latents leave and enter this module *scaled*, that is with a standard deviation near one: the factor of the
config is applied here and nowhere else.

Kingma & Welling 2013 (VAE); Esser et al. 2021 (VQGAN, whose networks these are);
Rombach et al. 2022, appendix G (latent diffusion).
"""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Downsample, ResBlock, Upsample, check_hf


@dataclass(frozen=True)
class VAEConfig:
    """The numbers that make one autoencoder. The defaults are Stable Diffusion 1.x's and 2.x's."""
    in_channels: int          = 3
    out_channels: int         = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)   # per level
    layers: int               = 2                      # ResBlocks per level of the encoder; decoder: one more
    latent_channels: int      = 4
    groups: int               = 32                     # of every GroupNorm
    scaling_factor: float     = 0.18215                # scaled latents = factor · (latents − shift)
    shift_factor: float       = 0.0
    force_upcast: bool        = True                   # float16 overflows (SDXL): run in float32
    quant_conv: bool          = True
    post_quant_conv: bool     = True
    mid_attention: bool       = True

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel along one side: 8 for four levels."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "VAEConfig":
        """Reads a `vae/config.json` of diffusers (`AutoencoderKL`).

        Missing and null fields have diffusers' defaults, unknown ones are ignored.

        Raises:
            ValueError: the file describes an architecture that is not implemented here; names the field.
        """
        get = {key: value for key, value in config.items() if value is not None}.get
        channels = tuple(get("block_out_channels", (64,)))
        check_hf(config, {"act_fn": "silu", "down_block_types": ["DownEncoderBlock2D"] * len(channels),
                          "up_block_types": ["UpDecoderBlock2D"] * len(channels),
                          "latents_mean": None, "latents_std": None}, "VAE")
        return cls(in_channels     = get("in_channels", 3),
                   out_channels    = get("out_channels", 3),
                   channels        = channels,
                   layers          = get("layers_per_block", 1),
                   latent_channels = get("latent_channels", 4),
                   groups          = get("norm_num_groups", 32),
                   scaling_factor  = get("scaling_factor", 0.18215),
                   shift_factor    = get("shift_factor", 0.0),
                   force_upcast    = get("force_upcast", True),
                   quant_conv      = get("use_quant_conv", True),
                   post_quant_conv = get("use_post_quant_conv", True),
                   mid_attention   = get("mid_block_add_attention", True))

    def to_hf(self) -> dict[str, Any]:
        """The `vae/config.json` from which `from_hf` makes this config again."""
        return {"_class_name": "AutoencoderKL",
                "in_channels": self.in_channels, "out_channels": self.out_channels,
                "block_out_channels": list(self.channels), "layers_per_block": self.layers,
                "down_block_types": ["DownEncoderBlock2D"] * len(self.channels),
                "up_block_types": ["UpDecoderBlock2D"] * len(self.channels),
                "latent_channels": self.latent_channels, "norm_num_groups": self.groups,
                "scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor,
                "force_upcast": self.force_upcast, "use_quant_conv": self.quant_conv,
                "use_post_quant_conv": self.post_quant_conv, "mid_block_add_attention": self.mid_attention}


class PixelAttention(nn.Module):
    """Self-attention over the positions of a feature map with a single head as wide as all channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q       = nn.Linear(channels, channels)
        self.to_k       = nn.Linear(channels, channels)
        self.to_v       = nn.Linear(channels, channels)
        self.to_out     = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)                                      # (N, L, C)
        q, k, v = (project(y)[:, None] for project in (self.to_q, self.to_k, self.to_v))       # (N, 1, L, C)
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).unflatten(2, x.shape[-2:])


class Mid(nn.Module):
    """ResBlock, self-attention, ResBlock at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets    = nn.ModuleList(
            ResBlock(channels, channels, None, groups, eps=1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


def _level(in_channels: int, channels: int, layers: int, groups: int) -> nn.Module:
    level = nn.Module()
    level.resnets = nn.ModuleList(
        ResBlock(in_channels if i == 0 else channels, channels, None, groups, eps=1e-6)
        for i in range(layers))
    return level


class Encoder(nn.Module):
    """(N, 3, H, W) → (N, 2·latent_channels, H/8, W/8)."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        self.conv_in     = nn.Conv2d(c.in_channels, c.channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = c.channels[0]
        for i, channels in enumerate(c.channels):
            level = _level(width, channels, c.layers, c.groups)
            if i < len(c.channels) - 1:
                level.downsamplers = nn.ModuleList([Downsample(channels, padding=0)])
            self.down_blocks.append(level)
            width = channels
        self.mid_block     = Mid(width, c.groups, c.mid_attention)
        self.conv_norm_out = nn.GroupNorm(c.groups, width, eps=1e-6)
        self.conv_out      = nn.Conv2d(width, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            for resnet in level.resnets:
                x = resnet(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """(N, latent_channels, h, w) → (N, 3, 8h, 8w)."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        width = c.channels[-1]
        self.conv_in   = nn.Conv2d(c.latent_channels, width, 3, padding=1)
        self.mid_block = Mid(width, c.groups, c.mid_attention)
        self.up_blocks = nn.ModuleList()
        for i, channels in reversed(list(enumerate(c.channels))):
            level = _level(width, channels, c.layers + 1, c.groups)
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(channels)])
            self.up_blocks.append(level)
            width = channels
        self.conv_norm_out = nn.GroupNorm(c.groups, width, eps=1e-6)
        self.conv_out      = nn.Conv2d(width, c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            for resnet in level.resnets:
                z = resnet(z)
            if hasattr(level, "upsamplers"):
                z = level.upsamplers[0](z, (2 * z.shape[-2], 2 * z.shape[-1]))
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class VAE(nn.Module):
    """The KL autoencoder. Parameter names are those of diffusers' `AutoencoderKL`."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        z = config.latent_channels
        self.config          = c = config
        self.encoder         = Encoder(c)
        self.decoder         = Decoder(c)
        self.quant_conv      = nn.Conv2d(2 * z, 2 * z, 1) if c.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if c.post_quant_conv else nn.Identity()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, H, W) in [−1, 1], H and W multiples of 8 → mean and standard deviation of latents.

        Both are (N, latent_channels, H/8, W/8), in scaled units. `mean + std * noise` draws a latent: the
        reparameterization trick of Kingma & Welling 2013.
        """
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))    # the bounds of the original code
        factor, shift = self.config.scaling_factor, self.config.shift_factor
        return factor * (mean - shift), factor * std

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, latent_channels, h, w) → pictures (N, 3, 8h, 8w).

        Their values lie in [−1, 1] but for overshoot.
        """
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(self.post_quant_conv(z))
