"""Old tensor names to the ones our modules carry.

Each function takes the tensors of a checkpoint and those that the model has (`wanted`, on the meta device),
and returns the former under the names of the latter. Names that are right already stay as they are.
"""
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State  = dict[str, Tensor]
Rename = Callable[[State, Mapping[str, Tensor]], State]

# Older versions of diffusers had names of their own for the autoencoder's attention; both kinds are around.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_vae_attention(state: State, wanted: Mapping[str, Tensor]) -> State:
    """`mid_block.attentions.0.query` → `to_q`, and so on.

    Weights stored as convolutions of size 1, (C, C, 1, 1) or (C, C, 1), become the (C, C) of a linear layer.
    """
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"(\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.",
                      lambda match: f"{match[1]}.{OLD_ATTENTION[match[2]]}.", name)
        if re.search(r"\.mid_block\.attentions\.0\.to_.*weight$", name) and tensor.shape[2:].numel() == 1:
            tensor = tensor.flatten(1)                                      # (C, C, 1, 1) → (C, C)
        renamed[name] = tensor
    return renamed


def rename_clip(state: State, wanted: Mapping[str, Tensor]) -> State:
    """CLIP text encoders, whichever version of transformers wrote the file and whichever is installed.

    Before transformers 5.6 all names in a `CLIPTextModel` began with `text_model.`; since then the prefix is
    gone, but not in `CLIPTextModelWithProjection`. `position_ids` is 0, 1, 2 …: some files store it, even as
    floats, and the models have it as a buffer that newer ones do not save, so it is made here.
    """
    renamed = {}
    for name, tensor in state.items():
        bare  = name.removeprefix("text_model.")
        name  = f"text_model.{bare}" if f"text_model.{bare}" in wanted else bare
        if not name.endswith(".position_ids"):
            renamed[name] = tensor
    for name, tensor in wanted.items():
        if name.endswith(".position_ids"):
            renamed[name] = torch.arange(tensor.shape[-1]).expand(tensor.shape)         # (1, 77)
    return renamed
