"""The U-Net of Stable Diffusion 1.x, 2.x and XL: latents, a time and a text in, one latent-shaped tensor out.

    x (N, 4, h, w)                                                             (N, 4, h, w)
        │ conv_in                                                        conv_out ▲
        ▼                                                                         │
      [ level 0   C₀   h   × w   ] ═══════════ layers + 1 skips ═══════════▶ [ level 0 ]
        │ downsample                                                     upsample ▲
      [ level 1   C₁   h/2 × w/2 ] ════════════════════════════════════════▶ [ level 1 ]
        │ downsample                                                     upsample ▲
      [ level 2   C₂   h/4 × w/4 ] ════════════════════════════════════════▶ [ level 2 ]
        │ downsample                                                     upsample ▲
      [ level 3   C₃   h/8 × w/8 ] ════════════════════════════════════════▶ [ level 3 ]
        │                                                                         ▲
        └──────────────── mid: ResBlock, transformer, ResBlock ───────────────────┘

Each level is a row of ResBlocks (they receive the time), each followed by a SpatialTransformer (it receives
the text) at the levels whose `depth` is not zero. Going down, the feature map is kept after conv_in, after
every layer and after every downsampling; going up, every layer takes the newest one kept. That stack of
skips is the whole wiring.

Ronneberger et al. 2015 (U-Net); Ho et al. 2020 (DDPM);
Rombach et al. 2022 (latent diffusion); Podell et al. 2023 (SDXL).
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    Downsample,
    ResBlock,
    SpatialTransformer,
    TimeMLP,
    Upsample,
    check_hf,
    guidance_embedding,
    timestep_embedding,
)


@dataclass(frozen=True)
class UNetConfig:
    """The numbers that make one U-Net. The defaults are Stable Diffusion 1.5's."""
    in_channels: int            = 4                       # 9 for inpainting: latents, mask, masked latents
    out_channels: int           = 4
    channels: tuple[int, ...]   = (320, 640, 1280, 1280)  # per level
    layers: int                 = 2                       # ResBlocks per level going down; one more going up
    depth: tuple[int, ...]      = (1, 1, 1, 0)            # transformer blocks per layer; 0: no attention
    mid_depth: int              = 1
    heads: tuple[int, ...]      = (8, 8, 8, 8)            # attention heads per level
    context_dim: int            = 768                     # width of the text encoder's states
    linear_projection: bool     = False                   # SD 2.x, XL: linear layers around the transformers
    groups: int                 = 32                      # of every GroupNorm
    eps: float                  = 1e-5                    # of the ResBlocks' GroupNorms
    vector_dim: int | None      = None                    # SDXL: width of the vector, pooled text and sizes
    vector_time_dim: int | None = None                    # SDXL: Fourier features of each number of the sizes
    guidance_dim: int | None    = None                    # LCM: Fourier features of the guidance scale
    sample_size: int | None     = None                    # default height and width, in latent pixels

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.depth) == len(self.heads):
            raise ValueError(f"U-Net: channels {self.channels}, depth {self.depth} and heads {self.heads} "
                             f"must have one entry per level.")
        for channels, heads in zip(self.channels, self.heads, strict=True):
            if channels % self.groups or channels % heads:
                raise ValueError(f"U-Net: a level of {channels} channels cannot be divided into "
                                 f"{self.groups} groups and {heads} heads.")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "UNetConfig":
        """Reads a `unet/config.json` of diffusers (`UNet2DConditionModel`).

        Missing and null fields have diffusers' defaults, but for `mid_block_type`, whose null means none;
        unknown ones are ignored. Two of them are not what they seem: `attention_head_dim` is the
        *number* of heads, and `transformer_layers_per_block` also has entries for the levels without any
        attention.

        Raises:
            ValueError: the file describes an architecture that is not implemented here; names the field.
        """
        get = {key: value for key, value in config.items() if value is not None}.get
        check_hf(config, _SUPPORTED, "U-Net")
        if config.get("mid_block_type", "") is None:
            raise ValueError("U-Net: config.json has mid_block_type = null, that is no middle block, as some "
                             "distilled models have; that is not implemented.")
        channels = tuple(get("block_out_channels", (320, 640, 1280, 1280)))
        levels   = len(channels)
        down     = tuple(get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)))
        up       = tuple(get("up_block_types",   ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3))
        unknown  = {*down, *up} - {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
        if unknown or [kind.replace("Up", "Down") for kind in reversed(up)] != list(down):
            raise ValueError(f"U-Net: config.json has down_block_types {down} and up_block_types {up}; "
                             f"only (CrossAttn)DownBlock2D mirrored by (CrossAttn)UpBlock2D is implemented.")
        for field in ("layers_per_block", "cross_attention_dim"):
            if not isinstance(get(field, 0), int):
                raise ValueError(f"U-Net: config.json has {field} = {get(field)!r}; one number for all "
                                 f"levels is implemented.")
        if get("addition_embed_type") not in (None, "text_time"):
            raise ValueError(f"U-Net: config.json has addition_embed_type = {get('addition_embed_type')!r}; "
                             f"only SDXL's 'text_time' is implemented.")

        def per_level(field: str, default: int) -> tuple[int, ...]:
            value  = get(field, default)
            values = (value,) * levels if isinstance(value, int) else tuple(value)
            if len(values) != levels or not all(isinstance(v, int) for v in values):
                raise ValueError(f"U-Net: config.json has {field} = {value!r}; "
                                 f"one integer, or one for each of the {levels} levels, is implemented.")
            return values

        sdxl  = get("addition_embed_type") == "text_time"
        for field in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"):
            if sdxl and get(field) is None:
                raise ValueError(f"U-Net: config.json has addition_embed_type = 'text_time', but no {field}.")
        depth = per_level("transformer_layers_per_block", 1)
        heads = per_level("num_attention_heads" if get("num_attention_heads") else "attention_head_dim", 8)
        return cls(in_channels       = get("in_channels", 4),
                   out_channels      = get("out_channels", 4),
                   channels          = channels,
                   layers            = get("layers_per_block", 2),
                   depth             = tuple(d if "CrossAttn" in kind else 0
                                             for d, kind in zip(depth, down, strict=True)),
                   mid_depth         = depth[-1],
                   heads             = heads,
                   context_dim       = get("cross_attention_dim", 1280),
                   linear_projection = get("use_linear_projection", False),
                   groups            = get("norm_num_groups", 32),
                   eps               = get("norm_eps", 1e-5),
                   vector_dim        = get("projection_class_embeddings_input_dim") if sdxl else None,
                   vector_time_dim   = get("addition_time_embed_dim") if sdxl else None,
                   guidance_dim      = get("time_cond_proj_dim"),
                   sample_size       = _sample_size(get))

    def to_hf(self) -> dict[str, Any]:
        """The `unet/config.json` from which `from_hf` makes this config again.

        ValueError: diffusers has no words for it.
        """
        cross = ["CrossAttn" if depth else "" for depth in self.depth]
        depth = [depth or self.mid_depth for depth in self.depth]           # it knows no 0 and no mid_depth
        if depth[-1] != self.mid_depth:
            raise ValueError(f"U-Net: mid_depth is {self.mid_depth} and depth {self.depth}; but in a "
                             f"config.json the middle is as deep as the last level.")
        return {"_class_name": "UNet2DConditionModel",
                "in_channels": self.in_channels, "out_channels": self.out_channels,
                "block_out_channels": list(self.channels), "layers_per_block": self.layers,
                "down_block_types": [f"{kind}DownBlock2D" for kind in cross],
                "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(cross)],
                "transformer_layers_per_block": depth, "attention_head_dim": list(self.heads),
                "cross_attention_dim": self.context_dim, "use_linear_projection": self.linear_projection,
                "upcast_attention": self.linear_projection and not self.vector_dim,     # 2.1 needs it there
                "norm_num_groups": self.groups, "norm_eps": self.eps,
                "addition_embed_type": "text_time" if self.vector_dim else None,
                "addition_time_embed_dim": self.vector_time_dim,
                "projection_class_embeddings_input_dim": self.vector_dim,
                "time_cond_proj_dim": self.guidance_dim, "sample_size": self.sample_size}


def _sample_size(get: Callable[..., Any]) -> int | None:
    """Of a square; diffusers also knows (height, width). Files from before its 0.9 say less than 64 of models
    that were trained at 64, as that for inpainting, and diffusers does not believe them either."""
    size = get("sample_size")
    size = max(size) if isinstance(size, list | tuple) else size
    made = tuple(int(number) for number in re.findall(r"\d+", get("_diffusers_version", "1.0"))[:2])
    return max(size, 64) if size and made < (0, 9) else size


# `upcast_attention` is not here: `layers.Attention` sums in float32 anyway.
_SUPPORTED = {
    "act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn", "time_embedding_type": "positional",
    "resnet_time_scale_shift": "default", "attention_type": "default", "flip_sin_to_cos": True,
    "freq_shift": 0, "downsample_padding": 1, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "center_input_sample": False, "only_cross_attention": False, "dual_cross_attention": False,
    "mid_block_only_cross_attention": False, "mid_block_scale_factor": 1, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "class_embed_type": None, "num_class_embeds": None,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "timestep_post_act": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
    "cross_attention_norm": None, "reverse_transformer_layers_per_block": None,
    "class_embeddings_concat": False,
}


class Level(nn.Module):
    """One resolution of the U-Net: parallel lists of ResBlocks and transformers, and at most one resize."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets      = nn.ModuleList()
        self.attentions   = nn.ModuleList()     # empty where the level has no attention
        self.downsamplers = nn.ModuleList()     # at most one of these two has one entry
        self.upsamplers   = nn.ModuleList()

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if self.attentions else x


class UNet(nn.Module):
    """F(x, t, context, vector, guidance) → tensor. Parameter names: of diffusers' `UNet2DConditionModel`."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        c, first = config, config.channels[0]
        time_width = 4 * first

        def resnet(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, time_width, c.groups, c.eps)

        def transformer(level: int, depth: int) -> SpatialTransformer:
            return SpatialTransformer(c.channels[level], c.context_dim, c.heads[level], depth, c.groups,
                                      c.linear_projection)

        self.conv_in        = nn.Conv2d(c.in_channels, first, 3, padding=1)
        self.time_embedding = TimeMLP(first, time_width, c.guidance_dim)
        self.add_embedding  = TimeMLP(c.vector_dim, time_width) if c.vector_dim else None

        last   = len(c.channels) - 1
        skips  = [first]                              # channels of each feature map that the way down keeps
        width  = first
        self.down_blocks = nn.ModuleList()
        for i, channels in enumerate(c.channels):
            level = Level()
            for _ in range(c.layers):
                level.resnets.append(resnet(width, channels))
                if c.depth[i]:
                    level.attentions.append(transformer(i, c.depth[i]))
                width = channels
                skips.append(width)
            if i < last:
                level.downsamplers.append(Downsample(channels, padding=1))
                skips.append(width)
            self.down_blocks.append(level)

        self.mid_block = Level()
        self.mid_block.resnets.extend([resnet(width, width), resnet(width, width)])
        self.mid_block.attentions.append(transformer(last, c.mid_depth))

        self.up_blocks   = nn.ModuleList()
        for i, channels in reversed(list(enumerate(c.channels))):
            level = Level()
            for _ in range(c.layers + 1):
                level.resnets.append(resnet(width + skips.pop(), channels))
                if c.depth[i]:
                    level.attentions.append(transformer(i, c.depth[i]))
                width = channels
            if i > 0:
                level.upsamplers.append(Upsample(channels))
            self.up_blocks.append(level)

        self.conv_norm_out = nn.GroupNorm(c.groups, first, c.eps)
        self.conv_out      = nn.Conv2d(first, c.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None,
                guidance: Tensor | None = None) -> Tensor:
        """One call of the network.

        Args:
            x:       (N, in_channels, h, w), any h and w of at least one pixel on the lowest level.
            t:       (N,) or (), times in the units of training, 0 … 999 for Stable Diffusion; not only whole.
            context: (N, S, context_dim) states of the text encoder.
            vector:  (N, vector_dim) for SDXL: pooled text and Fourier features of the sizes; otherwise None.
            guidance: (N,) guidance scales for LCM, where 1 is none; otherwise None.

        Returns:
            (N, out_channels, h, w): ε, v or x₀, as the weights were trained; the network does not know.

        Raises:
            ValueError: an SDXL U-Net without vector or with one of another width, an LCM one without
                guidance.
        """
        time, scale = timestep_embedding(t.expand(len(x)), self.config.channels[0]).to(x.dtype), None
        if self.config.guidance_dim is not None:
            if guidance is None:
                raise ValueError("This U-Net (LCM) needs guidance: a tensor (N,) of scales, 1 for none.")
            scale = guidance_embedding(guidance, self.config.guidance_dim).to(x.dtype)
        time = self.time_embedding(time, scale)
        if self.add_embedding is not None:
            if vector is None or vector.shape[-1] != self.config.vector_dim:
                found = vector if vector is None else tuple(vector.shape)
                raise ValueError(f"This U-Net (SDXL) needs vector: a tensor (N, {self.config.vector_dim}), "
                                 f"not {found}; Pipeline.condition makes it.")
            time = time + self.add_embedding(vector)

        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(self.config.layers):
                x = level.layer(i, x, time, context)
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)

        x = self.mid_block.layer(0, x, time, context)
        x = self.mid_block.resnets[1](x, time)

        for level in self.up_blocks:
            for i in range(self.config.layers + 1):
                x = level.layer(i, torch.cat([x, skips.pop()], dim=1), time, context)
            for upsample in level.upsamplers:
                # To the size of the next skip, not to twice its own: after an odd size these differ by one.
                x = upsample(x, skips[-1].shape[-2:])

        return self.conv_out(F.silu(self.conv_norm_out(x)))
