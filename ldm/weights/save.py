"""From modules to files: a model in the layout of Hugging Face, which diffusers and `ldm.load` read."""
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models import VAE, TinyVAE, TinyVAEConfig, UNet, UNetConfig, VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DIFFUSERS = "0.30.0"    # the version of diffusers whose fields these are; it mends those of older ones


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into. It gets its name `target` when all is there, and is removed if anything fails.

    FileExistsError: `target` exists, and is not an empty folder.
    """
    target = target.expanduser().resolve()          # of a link, what it leads to
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; nothing is written over. Give a new name")
    building = target.with_name(f"{target.name}.{os.getpid()}.part")
    building.mkdir(parents=True)
    try:
        yield building
        if target.exists():
            target.rmdir()                          # empty, or this fails
        building.rename(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def model_index(unet: UNetConfig, vae: VAEConfig | TinyVAEConfig, encoders: Mapping[str, nn.Module],
                scheduler: str, own: Mapping[str, Any], zero_empty: bool) -> dict[str, Any]:
    """The model_index.json: which of diffusers' pipelines it is, and the class of each part.

    encoders: by name, "text_encoder" or "text_encoder_2". scheduler: its class. own: our own defaults.
    """
    xl      = unet.vector_dim is not None
    refiner = xl and len(encoders) == 1
    family  = "StableDiffusionXL" if xl else "StableDiffusion"
    task    = "Inpaint" if unet.in_channels == 9 else "Img2Img" if refiner else ""
    lcm     = unet.guidance_dim is not None and not xl
    absent  = [None, None]
    index   = {"_class_name": "LatentConsistencyModelPipeline" if lcm else f"{family}{task}Pipeline",
               "_diffusers_version": DIFFUSERS, "_ldm": dict(own),  # which diffusers ignores, for its _
               "unet": ["diffusers", unet.to_hf()["_class_name"]],
               "vae": ["diffusers", vae.to_hf()["_class_name"]],
               "scheduler": ["diffusers", scheduler],
               "feature_extractor": absent, "image_encoder": absent}
    for name in ("text_encoder", "text_encoder_2")[:1 + xl]:
        encoder, tokenizer = encoders.get(name), name.replace("text_encoder", "tokenizer")
        index[name]      = ["transformers", type(encoder).__name__] if encoder else absent
        index[tokenizer] = ["transformers", "CLIPTokenizer"] if encoder else absent
    if xl:
        return index | {"force_zeros_for_empty_prompt": zero_empty, "requires_aesthetics_score": refiner}
    return index | {"safety_checker": absent, "requires_safety_checker": False}


def write_network(module: UNet | VAE | TinyVAE, folder: Path, dtype: torch.dtype | None = None,
                  **fields: Any) -> None:
    """Writes a network: config.json, and its tensors as one safetensors file.

    dtype:  of its floating-point tensors; None leaves each as it is.
    fields: of config.json, which differ from what the network's own config says.

    ValueError: its tensors are not those of its config, or not in the range of the dtype.
    """
    with torch.device("meta"):
        wanted = type(module)(module.config).state_dict()           # type: ignore[arg-type]
    state  = module.state_dict()
    shapes = ({(name, tensor.shape) for name, tensor in tensors.items()} for tensors in (state, wanted))
    if different := set.symmetric_difference(*shapes):
        raise ValueError(f"This {type(module).__name__} is not as its config says ({min(different)[0]}): "
                         "save the model as it was before its layers were changed")
    config = {"_diffusers_version": DIFFUSERS, **module.config.to_hf(), **fields}
    write_json(folder / "config.json", config)
    _write_tensors(folder / "diffusion_pytorch_model.safetensors", state, dtype)


def write_text_encoder(model: "CLIPTextModel | CLIPTextModelWithProjection", folder: Path,
                       dtype: torch.dtype | None = None) -> None:
    """Writes a text encoder, under the names that every version of transformers knows. As `write_network`."""
    state  = {name if name.startswith("text_") else f"text_model.{name}": tensor
              for name, tensor in model.state_dict().items()}
    config = json.loads(model.config.to_json_string())
    write_json(folder / "config.json", {**config, "architectures": [type(model).__name__],
                                        "dtype": str(dtype or model.dtype).removeprefix("torch.")})
    _write_tensors(folder / "model.safetensors", state, dtype)


def write_tokenizer(tokenizer: "CLIPTokenizer", folder: Path) -> None:
    """Writes a tokenizer: what this version of transformers writes, and the two files of older ones."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    write_json(folder / "tokenizer_config.json",                # without traces of how it was loaded here
               {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")})
    if not (folder / "vocab.json").is_file():
        tokenizer.backend_tokenizer.model.save(str(folder))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(file: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in state.items():
        cast = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        if dtype is not None and not cast.isfinite().all() and tensor.isfinite().all():
            raise ValueError(f"{name} has numbers too large for {dtype}: save in bfloat16 or float32")
        tensors[name] = cast
    save_file(tensors, file, metadata={"format": "pt"})             # transformers refuses files without it
