"""From tensors to modules: built on the meta device, renamed, checked, and only then given memory."""
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..models import VAE, TinyVAE, TinyVAEConfig, UNet, UNetConfig, VAEConfig
from .detect import kind
from .names import Rename, State, rename_ldm_unet, rename_ldm_vae, rename_open_clip, rename_taesd
from .read import read_json, refuse_lfs_pointer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SHOWN = 8       # tensors of each kind that a message lists

Module = TypeVar("Module", bound=nn.Module)


class Part(NamedTuple):
    """What a folder or a file knows of one part of a model."""
    where: str                  # the file or folder that it was read from, for messages
    config: dict[str, Any]      # as config.json has it
    tensors: State              # under the names of the file


def load_part(name: str, part: Part, *, device: str | torch.device = "cpu",
              dtype: torch.dtype | None = None) -> Any:
    """The module of a part: "unet", "vae", "text_encoder" or "text_encoder_2", as `load_module` makes it.

    ValueError: the config describes something that is not implemented.
    """
    build, rename = plan(name, part)
    return load_module(build, part.tensors, part.where, device=device, dtype=dtype, rename=rename)


def plan(name: str, part: Part) -> tuple[Callable[[], nn.Module], Rename]:
    """For a part: what builds its module, and what knows all the names that its tensors go by."""
    if name == "unet":
        unet_config = UNetConfig.from_hf(part.config)
        return lambda: UNet(unet_config), rename_ldm_unet
    if name == "vae":
        config = vae_config(part)
        if isinstance(config, TinyVAEConfig):
            return lambda: TinyVAE(config), rename_taesd
        return lambda: VAE(config), rename_ldm_vae
    if not name.startswith("text_encoder"):
        raise ValueError(f"{part.where} is a {name}, which ldm does not have")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    classes = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    found   = (part.config.get("architectures") or ["CLIPTextModel"])[0]
    if found not in classes:
        raise ValueError(f"config.json of {part.where} describes a {found}; "
                         f"it can be a {' or a '.join(classes)}")
    # transformers would fetch and run a kernel that a config names as the implementation of its attention.
    fields = {key: value for key, value in part.config.items() if "_implementation" not in key}

    def text_encoder() -> nn.Module:
        try:
            return classes[found](CLIPTextConfig.from_dict(fields))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"config.json of {part.where} describes no text encoder that transformers can "
                             f"make: {error!r}") from error
    return text_encoder, rename_open_clip


def vae_config(part: Part) -> VAEConfig | TinyVAEConfig:
    tiny = part.config.get("_class_name") == "AutoencoderTiny"
    return TinyVAEConfig.from_hf(part.config) if tiny else VAEConfig.from_hf(part.config)


def load_module(build: Callable[[], Module], tensors: State, where: str, *,
                device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                rename: Rename | None = None) -> Module:
    """The module that `build` makes, with the given weights, in evaluation mode and frozen.

    where:   the file or folder that they were read from, for messages.
    dtype:   of the floating-point tensors; None keeps the file's. They are cast one by one, so memory peaks
             one tensor above the finished module. What needs no cast and stays on the CPU remains mapped
             from the file: replace such a file as a whole, never write into it while the module lives.
    rename:  old names to new, see names.py.

    Frozen: no parameter requires a gradient, but gradients with respect to inputs flow as ever. To train,
    call `.requires_grad_(True).train()`.

    Strict: these are the tensors of the model, all, no others, in the same shapes, or a ValueError says which
    are not. Buffers that are never saved (`persistent=False`) must come from `rename`, so nothing stays on
    the meta device.
    """
    module, wanted = skeleton(build)
    buffers = dict(module.named_buffers())
    state   = dict(tensors) if rename is None else rename(tensors, wanted)
    _check(state, wanted, where)
    for name in wanted:
        tensor = state.pop(name)
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last,
                tensor if name in buffers else nn.Parameter(tensor, requires_grad=False))
    return module.eval()


def skeleton(build: Callable[[], Module]) -> tuple[Module, dict[str, Tensor]]:
    """The module on the meta device, without memory, and all tensors that it wants, by name."""
    with torch.device("meta"):
        module = build()
    return module, {**module.state_dict(), **dict(module.named_buffers())}


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
    """The CLIP tokenizer in `folder`. FileNotFoundError: no vocabulary (transformers goes on without one)."""
    import transformers

    if not (folder / "vocab.json").is_file() and (folder / "tokenizer.json").is_file():
        read_json(folder / "tokenizer.json")   # transformers 5 writes only this; the Fast class of 4 reads it
        kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
        return kind.from_pretrained(str(folder), local_files_only=True)
    read_json(folder / "vocab.json")
    merges = folder / "merges.txt"
    if not merges.is_file():
        raise FileNotFoundError(f"{folder} lacks merges.txt, the other half of vocab.json: download it again")
    refuse_lfs_pointer(merges)
    if not merges.stat().st_size:
        raise ValueError(f"{merges} is empty: download it again")
    return transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """One ValueError with everything in which the tensors differ from those of the model."""
    wrong = {"missing from the file": [name for name in wanted if name not in state],
             "unknown to the model":  [name for name in state if name not in wanted],
             "of another shape":      [f"{name} {tuple(state[name].shape)}, in the model {tuple(model.shape)}"
                                       for name, model in wanted.items()
                                       if name in state and state[name].shape != model.shape],
             "of whole numbers":      [f"{name} ({state[name].dtype})" for name, model in wanted.items()
                                       if name in state and model.is_floating_point()
                                       and not state[name].is_floating_point()]}
    if any(wrong.values()):
        lists = "".join(f"\n  {len(names)} {what}: {shown(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"The weights in {where} do not fit the model.{lists}\n"
                         f"The file looks like {kind(state)}, the model like {kind(wanted)}. "
                         "Weights and configuration must come from the same model.")


def shown(names: list[str]) -> str:
    """The first few of many tensors."""
    return ", ".join(names[:SHOWN]) + " …" * (len(names) > SHOWN)
