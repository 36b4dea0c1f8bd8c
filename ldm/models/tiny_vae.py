"""TAESD, the tiny autoencoder: the same latents as the large one of `vae.py`, for a fraction of its time.

    encoder   conv ─ block ─ ↓ ─ 3 blocks ─ ↓ ─ 3 blocks ─ ↓ ─ 3 blocks ─ conv ─▶ latents
    decoder   clamp ─ conv ─ 3 blocks ─ ↑ ─ 3 blocks ─ ↑ ─ 3 blocks ─ ↑ ─ block ─ conv ─▶ picture

Everything inside is 64 channels wide: 3×3 convolutions and ReLUs, without norms and attention. It is good for
previews, and for fast pictures with less of the fine detail.

Ollin Boer Bohan 2023 (github.com/madebyollin/taesd); there is no paper.
"""
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import check_hf


@dataclass(frozen=True)
class TinyVAEConfig:
    """The numbers that make one tiny autoencoder. The defaults are those of TAESD and TAESDXL."""
    in_channels: int                = 3
    out_channels: int               = 3
    channels: int                   = 64                # of every layer inside
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)      # per level, from the picture down
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)      # per level, from the latents up
    latent_channels: int            = 4
    scaling_factor: float           = 1.0               # it learnt the scaled latents themselves
    shift_factor: float             = 0.0

    force_upcast: ClassVar[bool] = False                # float16 suffices

    def __post_init__(self) -> None:
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(f"Tiny autoencoder: encoder_blocks {self.encoder_blocks} and decoder_blocks "
                             f"{self.decoder_blocks} must have as many levels.")

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel along one side: 8 for four levels."""
        return 2 ** (len(self.encoder_blocks) - 1)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "TinyVAEConfig":
        """Reads a `config.json` of diffusers (`AutoencoderTiny`).

        Missing and null fields have diffusers' defaults, unknown ones are ignored. `latent_magnitude` and
        `latent_shift` are among these: they tell how to store latents as bytes.

        Raises:
            ValueError: the file describes an architecture that is not implemented here; names the field.
        """
        get      = {key: value for key, value in config.items() if value is not None}.get
        encoder  = tuple(get("num_encoder_blocks", (1, 3, 3, 3)))
        decoder  = tuple(get("num_decoder_blocks", (3, 3, 3, 1)))
        channels = get("encoder_block_out_channels", (64,))[0]
        check_hf(config, {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2,
                          "encoder_block_out_channels": [channels] * len(encoder),
                          "decoder_block_out_channels": [channels] * len(decoder)}, "Tiny autoencoder")
        return cls(in_channels     = get("in_channels", 3),
                   out_channels    = get("out_channels", 3),
                   channels        = channels,
                   encoder_blocks  = encoder,
                   decoder_blocks  = decoder,
                   latent_channels = get("latent_channels", 4),
                   scaling_factor  = get("scaling_factor", 1.0),
                   shift_factor    = get("shift_factor", 0.0))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` from which `from_hf` makes this config again."""
        widths = [self.channels] * len(self.encoder_blocks)
        return {"_class_name": "AutoencoderTiny",
                "in_channels": self.in_channels, "out_channels": self.out_channels,
                "encoder_block_out_channels": widths, "decoder_block_out_channels": widths,
                "num_encoder_blocks": list(self.encoder_blocks),
                "num_decoder_blocks": list(self.decoder_blocks),
                "latent_channels": self.latent_channels, "scaling_factor": self.scaling_factor,
                "shift_factor": self.shift_factor}


class Block(nn.Module):
    """Three convolutions beside a skip: (N, C, h, w) → (N, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(channels, channels), nn.ReLU(), _conv(channels, channels), nn.ReLU(),
                                  _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def _conv(in_channels: int, out_channels: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)


class Layers(nn.Module):
    """One half of the autoencoder: a row of layers, whose numbers are in the names of the parameters."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TinyVAE(nn.Module):
    """TAESD, to be used where a `VAE` is. Parameter names are those of diffusers' `AutoencoderTiny`."""

    def __init__(self, config: TinyVAEConfig = TinyVAEConfig()):
        super().__init__()
        self.config = c = config
        layers: list[nn.Module] = [_conv(c.in_channels, c.channels)]
        for i, blocks in enumerate(c.encoder_blocks):
            if i > 0:
                layers.append(_conv(c.channels, c.channels, stride=2, bias=False))
            layers.extend(Block(c.channels) for _ in range(blocks))
        self.encoder = Layers([*layers, _conv(c.channels, c.latent_channels)])

        layers = [_conv(c.latent_channels, c.channels), nn.ReLU()]
        for i, blocks in enumerate(c.decoder_blocks):
            if i > 0:
                layers.extend([nn.Upsample(scale_factor=2), _conv(c.channels, c.channels, bias=False)])
            layers.extend(Block(c.channels) for _ in range(blocks))
        self.decoder = Layers([*layers, _conv(c.channels, c.out_channels)])

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, H, W) in [−1, 1], H and W multiples of 8 → mean and standard deviation of latents.

        Both are (N, latent_channels, H/8, W/8), in scaled units, as of a `VAE`; the latter is zero.
        """
        z = self.encoder((images + 1) / 2)                                      # its pictures are in [0, 1]
        z = self.config.scaling_factor * (z - self.config.shift_factor)
        return z, torch.zeros_like(z)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, latent_channels, h, w) → pictures (N, 3, 8h, 8w).

        Their values lie in [−1, 1] but for overshoot. The latents are softly clamped to [−3, 3].
        """
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return 2 * self.decoder(torch.tanh(z / 3) * 3) - 1
