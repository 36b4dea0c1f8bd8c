"""From files to modules: built on the meta device, read, renamed, checked, and only then given memory."""
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .names import Rename, rename_clip
from .read import read_json, read_tensors, weight_files

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# How to tell what a set of tensors is: part of a name → what it is, and whose second dimension says more.
KINDS = (
    ("model.diffusion_model.",     "a single-file checkpoint in LDM names",   ""),
    ("lora",                       "a LoRA",                                  ""),
    ("controlnet_cond_embedding.", "a ControlNet",                            ""),
    ("input_blocks.",              "a U-Net in LDM names",                    ""),
    ("time_embedding.",            "a U-Net with {} input channels",          "conv_in.weight"),
    ("mid.attn_1.",                "an autoencoder in LDM names",             ""),
    ("decoder.mid_block.",         "an autoencoder with {} latent channels",  "decoder.conv_in.weight"),
    ("vision_model.",              "a CLIP with image encoder",               ""),
    ("token_embedding.",           "a CLIP text encoder of width {}",         "token_embedding.weight"),
    ("SelfAttention.",             "a T5 text encoder",                       ""),
)
SHOWN = 8       # tensors of each kind that an error lists

Module = TypeVar("Module", bound=nn.Module)


def load_module(build: Callable[[], Module], folder: Path, *, variant: str | None = None,
                device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                rename: Rename | None = None) -> Module:
    """The module that `build` makes, with the weights in `folder`, in evaluation mode and frozen.

    variant: a second set of weights, "fp16" say; see `weight_files`.
    dtype:   of the floating-point tensors; None keeps the file's. They are cast one by one, so memory peaks
             one tensor above the finished module. What needs no cast and stays on the CPU remains mapped
             from the file: replace such a file as a whole, never write into it while the module lives.
    rename:  old names to new, see names.py.

    Frozen: no parameter requires a gradient, but gradients with respect to inputs flow as ever. To train,
    call `.requires_grad_(True).train()`.

    Strict: the files hold the tensors of the model, all, no others, in the same shapes, or a ValueError says
    which do not. Buffers that are never saved (`persistent=False`) must come from `rename`, so nothing stays
    on the meta device. FileNotFoundError, ValueError: as `weight_files` and `read_tensors`.
    """
    with torch.device("meta"):
        module = build()
    buffers = dict(module.named_buffers())
    wanted  = {**module.state_dict(), **buffers}
    files   = weight_files(folder, variant)
    state   = read_tensors(files)
    if rename is not None:
        state = rename(state, wanted)
    _check(state, wanted, files)
    for name in wanted:
        tensor = state.pop(name)
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last,
                tensor if name in buffers else nn.Parameter(tensor, requires_grad=False))
    return module.eval()


def load_text_encoder(folder: Path, *, variant: str | None = None, device: str | torch.device = "cpu",
                      dtype: torch.dtype | None = None) -> "CLIPTextModel | CLIPTextModelWithProjection":
    """The CLIP text encoder in `folder`, whichever version of transformers wrote it.

    A loader that is not strict leaves random weights where names are new to it; here every tensor of the file
    reaches the model, or an error says which did not. The arguments and the state of the model are those of
    `load_module`. ValueError: `config.json` describes something else.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    classes: dict[str, type[CLIPTextModel | CLIPTextModelWithProjection]] = {
        "CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    config = read_json(folder / "config.json")
    name   = (config.get("architectures") or ["CLIPTextModel"])[0]
    if name not in classes:
        raise ValueError(f"{folder / 'config.json'} describes a {name}; it can be a {' or a '.join(classes)}")
    return load_module(lambda: classes[name](CLIPTextConfig.from_dict(config)), folder,
                       variant=variant, device=device, dtype=dtype, rename=rename_clip)


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
    """The CLIP tokenizer in `folder`. FileNotFoundError: no vocabulary (transformers goes on without one)."""
    import transformers

    if not (folder / "vocab.json").is_file() and (folder / "tokenizer.json").is_file():
        read_json(folder / "tokenizer.json")   # transformers 5 writes only this; the Fast class of 4 reads it
        kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
        return kind.from_pretrained(str(folder), local_files_only=True)
    read_json(folder / "vocab.json")
    if not (folder / "merges.txt").is_file():
        raise FileNotFoundError(f"{folder} lacks merges.txt, the other half of vocab.json: download it again")
    return transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], files: list[Path]) -> None:
    """One ValueError with everything in which the tensors of the files differ from those of the model."""
    wrong = {"missing from the file": [name for name in wanted if name not in state],
             "unknown to the model":  [name for name in state if name not in wanted],
             "of another shape":      [f"{name} {tuple(state[name].shape)}, in the model {tuple(model.shape)}"
                                       for name, model in wanted.items()
                                       if name in state and state[name].shape != model.shape]}
    if any(wrong.values()):
        lists = "".join(f"\n  {len(names)} {what}: {', '.join(names[:SHOWN])}" + " …" * (len(names) > SHOWN)
                        for what, names in wrong.items() if names)
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
        raise ValueError(f"The weights in {where} do not fit the model.{lists}\n"
                         f"The file looks like {_kind(state)}, the model like {_kind(wanted)}. "
                         "Weights and config.json must come from the same model.")


def _kind(tensors: Mapping[str, Tensor]) -> str:
    """What a model with these tensors probably is, for error messages."""
    for mark, kind, telling in KINDS:
        if any(mark in name for name in tensors):
            widths = [tensor.shape[1] for name, tensor in tensors.items()
                      if telling and name.endswith(telling) and tensor.ndim > 1]
            return kind.format(widths[0] if widths else "unknown")
    return "something unknown"
