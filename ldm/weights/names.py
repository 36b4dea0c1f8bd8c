"""Old tensor names to the ones our modules carry.

Each function takes the tensors of a checkpoint and those that the model has (`wanted`, on the meta device),
and returns the former under the names of the latter. Names that are right already stay as they are, so one
function serves every file of its kind, and each tensor is renamed by itself, whatever else the file holds.

"LDM names" are those of the original code of latent diffusion (CompVis, later Stability's sgm).
"""
import re
from collections.abc import Callable, Mapping
from itertools import count

import torch
from torch import Tensor

State  = dict[str, Tensor]
Rename = Callable[[State, Mapping[str, Tensor]], State]

# LDM's names of what does not depend on a position in the network: pattern → ours.
UNET_NAMES = (
    (r"^time_embed\.0\.",               "time_embedding.linear_1."),
    (r"^time_embed\.2\.",               "time_embedding.linear_2."),
    (r"^time_embed\.cond_proj\.",       "time_embedding.cond_proj."),       # LCM
    (r"^label_emb\.0\.0\.",             "add_embedding.linear_1."),
    (r"^label_emb\.0\.2\.",             "add_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.",          "conv_in."),
    (r"^middle_block\.0\.",             "mid_block.resnets.0."),
    (r"^middle_block\.1\.",             "mid_block.attentions.0."),
    (r"^middle_block\.2\.",             "mid_block.resnets.1."),
    (r"^out\.0\.",                      "conv_norm_out."),
    (r"^out\.2\.",                      "conv_out."),
)
RESBLOCK_NAMES = (
    (r"\.in_layers\.0\.",               ".norm1."),
    (r"\.in_layers\.2\.",               ".conv1."),
    (r"\.emb_layers\.1\.",              ".time_emb_proj."),
    (r"\.out_layers\.0\.",              ".norm2."),
    (r"\.out_layers\.3\.",              ".conv2."),
    (r"\.skip_connection\.",            ".conv_shortcut."),
)
VAE_NAMES = (
    (r"\.norm_out\.",                   ".conv_norm_out."),
    (r"\.mid\.block_1\.",               ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.",               ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.",          ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.",       r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.",      ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d+)\.block\.",         r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.",    r".down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.",               ".conv_shortcut."),
    # Older versions of diffusers had names of their own for the attention; both kinds are around.
    (r"(\.attentions\.0)\.query\.",     r"\1.to_q."),
    (r"(\.attentions\.0)\.key\.",       r"\1.to_k."),
    (r"(\.attentions\.0)\.value\.",     r"\1.to_v."),
    (r"(\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)
OPEN_CLIP_NAMES = (
    (r"^positional_embedding$",         "embeddings.position_embedding.weight"),
    (r"^token_embedding\.",             "embeddings.token_embedding."),
    (r"^ln_final\.",                    "final_layer_norm."),
    (r"^transformer\.resblocks\.",      "encoder.layers."),
    (r"\.ln_([12])\.",                  r".layer_norm\1."),
    (r"\.mlp\.c_fc\.",                  ".mlp.fc1."),
    (r"\.mlp\.c_proj\.",                ".mlp.fc2."),
    (r"\.attn\.out_proj\.",             ".self_attn.out_proj."),
)


def rename_ldm_unet(state: State, wanted: Mapping[str, Tensor]) -> State:
    """A U-Net in LDM names (`input_blocks.4.1.proj_in.weight`).

    LDM numbers the blocks of a whole way through: going down, a level is its layers and one downsampling;
    going up, its layers, the last of which upsamples after its attention or in its place.
    """
    per_level = 1 + _count(wanted, "down_blocks.0.resnets.{}.conv1.weight")     # down and up alike
    renamed = {}
    for name, tensor in state.items():
        new = _replace(name, UNET_NAMES)
        if match := re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.", new):
            down, block, piece = match[1] == "input", int(match[2]), int(match[3])
            rest         = new[match.end():]
            level, layer = divmod(block - down, per_level)          # input_blocks.0 was conv_in
            if rest.startswith("op."):
                place, rest = "downsamplers.0.conv", rest.removeprefix("op.")
            elif rest.startswith("conv."):
                place, rest = "upsamplers.0.conv", rest.removeprefix("conv.")
            else:
                place = f"{'attentions' if piece else 'resnets'}.{layer}"
            new = f"{'down' if down else 'up'}_blocks.{level}.{place}.{rest}"
        renamed[_replace(new, RESBLOCK_NAMES)] = tensor
    return renamed


def rename_ldm_vae(state: State, wanted: Mapping[str, Tensor]) -> State:
    """An autoencoder in LDM names (`decoder.up.3.block.0.conv1.weight`), or those of older diffusers.

    LDM numbers the decoder's levels by resolution, the finest is `up.0`; ours are numbered as they come. The
    attention's weights may be stored as convolutions of size 1, (C, C, 1, 1) or (C, C, 1); ours are (C, C).
    """
    last    = _count(wanted, "decoder.up_blocks.{}.resnets.0.conv1.weight") - 1
    renamed = {}
    for name, tensor in state.items():
        new = _replace(name, VAE_NAMES)
        new = re.sub(r"\.up\.(\d+)\.", lambda match: f".up_blocks.{last - int(match[1])}.", new)
        if ".up_blocks." in new:
            new = _replace(new, ((r"\.block\.", ".resnets."), (r"\.upsample\.", ".upsamplers.0.")))
        if re.search(r"\.mid_block\.attentions\.0\.to_.*weight$", new) and tensor.shape[2:].numel() == 1:
            tensor = tensor.flatten(1)
        renamed[new] = tensor
    return renamed


def rename_taesd(state: State, wanted: Mapping[str, Tensor]) -> State:
    """The tiny autoencoder in its author's names; those of diffusers stay as they are.

    The author's code numbers the layers (`encoder.1.conv.0.weight`). His decoder has one layer more, a clamp
    without weights in front.
    """
    def ours(match: re.Match[str]) -> str:
        return f"{match[1]}.layers.{int(match[2]) - (match[1] == 'decoder')}."
    return {re.sub(r"^(encoder|decoder)\.(\d+)\.", ours, name): tensor for name, tensor in state.items()}


def rename_open_clip(state: State, wanted: Mapping[str, Tensor]) -> State:
    """A text encoder in OpenCLIP's names (`transformer.resblocks.0.ln_1.weight`), or as `rename_clip`.

    Queries, keys and values are one fused layer there, (3·D, D), and three here. Its text projection is
    multiplied from the right, so it is the transpose of a linear layer's. A model of one layer less than the
    file does without its last one: Stable Diffusion 2.x reads the layer before it.
    """
    layer   = "encoder.layers.{}.mlp.fc1.weight"
    depth   = _count(wanted, layer) or _count(wanted, f"text_model.{layer}")
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(f"transformer.resblocks.{depth}."):
            continue
        new = _replace(name, OPEN_CLIP_NAMES)
        if match := re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", new):
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{match[1]}.self_attn.{letter}_proj.{match[2]}"] = third
        elif name == "text_projection":
            renamed["text_projection.weight"] = tensor.T.contiguous()
        else:
            renamed[new] = tensor
    return rename_clip(renamed, wanted)


def rename_clip(state: State, wanted: Mapping[str, Tensor]) -> State:
    """CLIP text encoders, whichever version of transformers wrote the file and whichever is installed.

    Before transformers 5.6 all names in a `CLIPTextModel` began with `text_model.`; since then the prefix is
    gone, but not in `CLIPTextModelWithProjection`. `position_ids` is 0, 1, 2 …: some files store it, even as
    floats, and the models have it as a buffer that newer ones do not save, so it is made here. What only
    comparing with pictures needs is left out: `logit_scale`, and the projection where the model has none.
    """
    renamed = {}
    for name, tensor in state.items():
        bare  = name.removeprefix("text_model.")
        name  = f"text_model.{bare}" if f"text_model.{bare}" in wanted else bare
        if not (name.endswith(".position_ids") or name == "logit_scale"
                or name == "text_projection.weight" and name not in wanted):
            renamed[name] = tensor
    for name, tensor in wanted.items():
        if name.endswith(".position_ids"):
            renamed[name] = torch.arange(tensor.shape[-1]).expand(tensor.shape)         # (1, 77)
    return renamed


def _count(wanted: Mapping[str, Tensor], name: str) -> int:
    """How many of these names there are, with 0, 1, 2 … for the braces."""
    return next(i for i in count() if name.format(i) not in wanted)


def _replace(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name
