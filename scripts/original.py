"""What the original code of Stable Diffusion says: the tensors of its files, and what its networks compute.

    python scripts/original.py --sd1 stable-diffusion --sd2 stablediffusion --sgm generative-models

makes tests/data/original/ again, with which tests/test_original.py compares our modules:

    tensors.json.gz       "full" or "small" → family → {name: shape}, every tensor of a whole checkpoint file
    outputs.safetensors   what the small versions answer, see `answers`

The arguments are folders with the original code, its package `ldm` or `sgm`; nothing of the code is kept:

    --sd1   https://github.com/CompVis/stable-diffusion          commit 21f890f
    --sd2   https://github.com/Stability-AI/stablediffusion      or the package stable-diffusion-sdkit 2.1.5
    --sgm   https://github.com/Stability-AI/generative-models    commit 0ad7de9

With --full-size "SDXL base" it compares our U-Net with the original of that family at full size instead, in
float32 and with random weights, and prints the largest difference (some minutes, 11 GiB for SDXL base).

Needs einops and open_clip_torch 2.20 besides what ldm needs. Whatever else that code imports and is not
installed (for training, for changing pictures) is not used here, and gets a stub. Its classes are called as
they are, but for the text encoders: those would download their weights, and are built without.
"""
import argparse
import gc
import gzip
import importlib
import importlib.abc
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

ROOT  = Path(__file__).resolve().parents[1]
OUT   = ROOT / "tests" / "data" / "original"
CODES = {"sd1": "ldm/models/diffusion/ddpm.py",         # argument → a file that must be there
         "sd2": "ldm/models/diffusion/ddpm.py",
         "sgm": "sgm/models/diffusion.py"}


@dataclass(frozen=True)
class Family:
    """The numbers of a yaml file of the original code, as far as they make the networks."""
    code: str                           # a key of CODES
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Sequence[tuple[int, int]]     # (width, layers) of each text encoder, with heads 64 wide
    scale_factor: float = 0.18215


_VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
_SD1 = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True,
        "transformer_depth": 1, "context_dim": 768, "legacy": False, "image_size": 32}
_SD2 = {**_SD1, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True,
        "context_dim": 1024}
_XL  = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2],
        "num_res_blocks": 2, "channel_mult": [1, 2, 4], "num_head_channels": 64,
        "use_linear_in_transformer": True, "transformer_depth": [1, 2, 10], "context_dim": 2048,
        "num_classes": "sequential", "adm_in_channels": 1280 + 6 * 256}
_REFINER = {**_XL, "model_channels": 384, "channel_mult": [1, 2, 4, 4], "transformer_depth": 4,
            "context_dim": 1280, "adm_in_channels": 1280 + 5 * 256}
_L, _H, _BIG_G = (768, 12), (1024, 24), (1280, 32)

FAMILIES = {
    "SD 1.5":         Family("sd1", _SD1, _VAE, [_L]),
    "SD 1.5 inpaint": Family("sd1", {**_SD1, "in_channels": 9}, _VAE, [_L]),
    "SD 2.1":         Family("sd2", _SD2, _VAE, [_H]),
    "SD 2 inpaint":   Family("sd2", {**_SD2, "in_channels": 9}, _VAE, [_H]),
    "SDXL base":      Family("sgm", _XL, _VAE, [_L, _BIG_G], 0.13025),
    "SDXL refiner":   Family("sgm", _REFINER, _VAE, [_BIG_G], 0.13025),
}

# The same, small. What no file tells stays as it is: 32 groups in a GroupNorm, 8 heads or such 64 wide, 256
# features of each of XL's numbers.
_32   = {"model_channels": 32, "context_dim": 128}
_64   = {"model_channels": 64, "context_dim": 128, "num_res_blocks": 1}
_V32  = {**_VAE, "ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1}
_TEXT = (128, 3)
SMALL = {
    "SD 1.5":         Family("sd1", {**_SD1, **_32}, _V32, [_TEXT]),
    "SD 1.5 inpaint": Family("sd1", {**_SD1, **_32, "in_channels": 9}, _V32, [_TEXT]),
    "SD 2.1":         Family("sd2", {**_SD2, **_64, "channel_mult": [1, 2, 2, 2]}, _V32, [_TEXT]),
    "SDXL base":      Family("sgm", {**_XL, **_64, "channel_mult": [1, 2, 3], "transformer_depth": [1, 2, 3],
                                     "context_dim": 2 * 128, "adm_in_channels": 128 + 6 * 256},
                             _V32, [_TEXT, _TEXT], 0.13025),
    "SDXL refiner":   Family("sgm", {**_REFINER, **_64, "channel_mult": [1, 2, 3, 3], "transformer_depth": 2,
                                     "adm_in_channels": 128 + 5 * 256}, _V32, [_TEXT], 0.13025),
}


# ── Weights and inputs by rule, so that both sides can make them ────────────────────────────────────────────

PROMPTS = ["a photograph of an astronaut riding a horse", ""]
SIZES   = {"original": (768, 1024), "crop": (16, 24), "target": (512, 640)}         # heights before widths
SCORE   = 7.5
TIMES   = (1, 801)


def random(name: str, *shape: int) -> Tensor:
    """Standard normal numbers, always the same for a name and a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """The tensor of that original name: no two are alike, and the signal keeps its size on its way."""
    if len(shape) > 1:
        return random(name, *shape) / (torch.Size(shape).numel() / shape[0]) ** 0.5
    return random(name, *shape) * 0.1 + (1 if name.endswith("weight") else 0)      # weights of norms around 1


def inputs(family: Family, height: int = 16, width: int = 8) -> dict[str, Tensor]:
    """What the networks are given: x, t, context and y the U-Net, latents and pictures the autoencoder."""
    given = {"x": random("x", 2, family.unet["in_channels"], height, width), "t": torch.tensor(TIMES),
             "context":  random("context", 2, 7, family.unet["context_dim"]),
             "latents":  random("latents", 2, 4, 2, 4),
             "pictures": random("pictures", 2, 3, 16, 32).clamp(-1, 1)}
    if vector := family.unet.get("adm_in_channels"):
        given["y"] = random("y", 2, vector)
    return given


# ── The original classes ────────────────────────────────────────────────────────────────────────────────────

class Absent(nn.Module):
    """Stands for any class of a package that is not there: as a base class, a decorator, a type."""
    BICUBIC = None                                                      # a default argument in open_clip

    def __init__(self, *_: Any, **__: Any):
        super().__init__()


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what the original code imports though we do not need it, where nothing else does."""
    NAMES = ("clip", "kornia", "omegaconf", "pytorch_lightning", "taming", "torchvision")

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (Absent,), {})

        module = ModuleType(spec.name)
        module.__getattr__ = attribute
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def whole(family: Family, folder: Path, device: str) -> nn.Module:
    """The original model whose state_dict a checkpoint file holds.

    device: of its networks; "meta" takes no memory.
    """
    take_from(folder)
    with redirect_stdout(StringIO()):                                               # it reports what it does
        return (_sgm if family.code == "sgm" else _ldm)(family, device).eval()


def take_from(folder: Path) -> None:
    """Has `ldm` and `sgm` mean the packages in a folder: two of the codes, and ours, have one name."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("ldm", "sgm")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    if (folder / "ldm").is_dir() and not (folder / "ldm/__init__.py").exists():         # ours would be found
        sys.modules["ldm"] = package = ModuleType("ldm")
        package.__path__ = [str(folder / "ldm")]


def _ldm(family: Family, device: str) -> nn.Module:
    ddpm = importlib.import_module("ldm.models.diffusion.ddpm")
    _build_on(device, ddpm)
    _build_text(family, "ldm")
    clip = "FrozenCLIPEmbedder" if family.code == "sd1" else "FrozenOpenCLIPEmbedder"
    return ddpm.LatentDiffusion(
        timesteps=1000, linear_start=0.00085, linear_end=0.012, conditioning_key="crossattn", use_ema=True,
        scale_factor       = family.scale_factor,
        unet_config        = _config("ldm.modules.diffusionmodules.openaimodel.UNetModel", **family.unet),
        first_stage_config = _config("ldm.models.autoencoder.AutoencoderKL", embed_dim=4, ddconfig=family.vae,
                                     lossconfig=_config("torch.nn.Identity")),
        cond_stage_config  = _config(f"ldm.modules.encoders.modules.{clip}", device="cpu",
                                     **({} if family.code == "sd1" else {"layer": "penultimate"})))


def _sgm(family: Family, device: str) -> nn.Module:
    engine = importlib.import_module("sgm.models.diffusion")
    _build_on(device, engine)
    _build_text(family, "sgm")

    def embedder(name: str, key: str, **params: Any) -> dict:
        return {**_config(f"sgm.modules.encoders.modules.{name}", **params), "input_key": key}

    base  = len(family.text) == 2
    clip  = embedder("FrozenCLIPEmbedder", "txt", device="cpu", layer="hidden",
                     layer_idx=family.text[0][1] - 1)                                   # 11 of 12
    big_g = embedder("FrozenOpenCLIPEmbedder2", "txt", device="cpu", layer="penultimate",
                     always_return_pooled=True, legacy=False)
    sizes = [embedder("ConcatTimestepEmbedderND", key, outdim=256)
             for key in ("original_size_as_tuple", "crop_coords_top_left",
                         "target_size_as_tuple" if base else "aesthetic_score")]
    parts = "sgm.modules.diffusionmodules"
    return engine.DiffusionEngine(
        scale_factor       = family.scale_factor, disable_first_stage_autocast=True,
        network_config     = _config(f"{parts}.openaimodel.UNetModel", **family.unet),
        denoiser_config    = _config(
            f"{parts}.denoiser.DiscreteDenoiser", num_idx=1000,
            scaling_config        = _config(f"{parts}.denoiser_scaling.EpsScaling"),
            discretization_config = _config(f"{parts}.discretizer.LegacyDDPMDiscretization")),
        conditioner_config = _config("sgm.modules.GeneralConditioner",
                                     emb_models=[*([clip] if base else []), big_g, *sizes]),
        first_stage_config = _config("sgm.models.autoencoder.AutoencoderKL", embed_dim=4, ddconfig=family.vae,
                                     lossconfig=_config("torch.nn.Identity")))


def _config(target: str, **params: Any) -> dict:
    return {"target": target, "params": params}


def _build_on(device: str, module: ModuleType) -> None:
    """Has the original code build networks on a device; but its denoiser is a table, which it computes."""
    build = module.instantiate_from_config

    def instantiate_from_config(config: dict) -> Any:
        with torch.device("cpu" if ".denoiser." in config["target"] else device):
            return build(config)
    module.instantiate_from_config = instantiate_from_config


def _build_text(family: Family, package: str) -> None:
    """Puts text encoders without weights in the place of those that the original code would download."""
    import open_clip

    class Clip(nn.Module):
        """As transformers 4 had it: all names begin with `text_model.`, and `position_ids` is saved."""

        def __init__(self) -> None:
            super().__init__()
            width, layers = family.text[0]
            model = CLIPTextModel(CLIPTextConfig(
                vocab_size=49408, hidden_size=width, intermediate_size=4 * width, hidden_act="quick_gelu",
                num_hidden_layers=layers, num_attention_heads=width // 64))
            self.text_model = getattr(model, "text_model", model)
            embeddings      = self.text_model.embeddings
            embeddings.register_buffer("position_ids", embeddings.position_ids, persistent=True)

        def forward(self, **arguments: Any) -> Any:
            return self.text_model(**arguments)

    def tokenize(prompts: list[str], **_: Any) -> dict[str, Tensor]:
        tokens = open_clip.tokenize(prompts)                                # pads with 0, but CLIP with 49407
        return {"input_ids": torch.where(tokens == 0, 49407, tokens)}

    def create(*_: Any, **__: Any) -> tuple[nn.Module, None, None]:
        width, layers = family.text[-1]
        pictures = {"layers": 1, "width": 64, "patch_size": 224}            # this half of it is not used
        text     = {"layers": layers, "width": width, "heads": width // 64}
        return open_clip.CLIP(width, pictures, text), None, None

    open_clip.create_model_and_transforms = create
    encoders = importlib.import_module(f"{package}.modules.encoders.modules")
    encoders.CLIPTextModel = SimpleNamespace(from_pretrained=lambda _: Clip())
    encoders.CLIPTokenizer = SimpleNamespace(from_pretrained=lambda _: tokenize)


# ── What is asked of them ───────────────────────────────────────────────────────────────────────────────────

def tensors(family: Family, folder: Path) -> dict[str, list[int]]:
    """Name → shape of a whole file."""
    return {name: list(tensor.shape) for name, tensor in whole(family, folder, "meta").state_dict().items()}


@torch.no_grad()
def answers(family: Family, folder: Path) -> dict[str, Tensor]:
    """What the networks answer to `inputs`, with the weights of the rule.

    unet:    its output.
    moments: mean and log σ² of the autoencoder, not scaled.
    decoded: the picture of scaled latents.
    context: what the U-Net is told of PROMPTS, every 7th of 77 tokens.
    vector:  XL only: the rest of that, with SIZES and SCORE.
    x0:      XL only: D(x; σ) at TIMES of a network that always says 1.
    """
    model = whole(family, folder, "cpu")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.startswith("denoiser."):
            tensor.copy_(weight(name, tensor.shape))
    given = inputs(family)
    vae   = model.first_stage_model
    found = {"unet":    _unet(model.model.diffusion_model, given),
             "moments": vae.quant_conv(vae.encoder(given["pictures"])),
             "decoded": model.decode_first_stage(given["latents"])}
    if family.code != "sgm":
        return {**found, "context": model.get_learned_conditioning(PROMPTS)[:, ::7]}
    told  = model.conditioner({"txt": PROMPTS, "aesthetic_score": torch.tensor([[SCORE]] * 2),
                               "original_size_as_tuple": torch.tensor([SIZES["original"]] * 2),
                               "crop_coords_top_left":   torch.tensor([SIZES["crop"]] * 2),
                               "target_size_as_tuple":   torch.tensor([SIZES["target"]] * 2)})
    sigma = model.denoiser.idx_to_sigma(given["t"])
    x0    = model.denoiser(lambda x, t, cond: torch.ones_like(x), given["x"], sigma, {})
    return {**found, "context": told["crossattn"][:, ::7], "vector": told["vector"], "x0": x0}


def _unet(unet: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return unet(given["x"], timesteps=given["t"], context=given["context"], y=given.get("y"))


@torch.no_grad()
def full_size(family: Family, folder: Path) -> tuple[float, float]:
    """(largest difference between our U-Net's output and the original's, largest number of the latter)."""
    given = inputs(family, 32, 32)
    unet  = whole(family, folder, "meta").model.diffusion_model
    names = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    unet.load_state_dict({name: weight(name, shape) for name, shape in names.items()}, assign=True)
    theirs = _unet(unet, given)
    del unet                                                                    # not both in memory
    gc.collect()

    take_from(ROOT)
    from ldm import weights
    from ldm.weights import detect
    state = {name: weight(name, shape) for name, shape in names.items()}
    ours  = weights.load_part("unet", weights.Part("here", detect.unet_config(state), state))
    return ((ours(given["x"], given["t"], given["context"], given.get("y")) - theirs).abs().max().item(),
            theirs.abs().max().item())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for code in CODES:
        parser.add_argument(f"--{code}", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--full-size", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--out", type=Path, default=OUT)
    args    = parser.parse_args()
    folders = {code: getattr(args, code) for code in CODES}
    for code, file in CODES.items():
        if not (folders[code] / file).is_file():
            sys.exit(f"--{code} {folders[code]}: there is no {file} in it. The top of this script says where "
                     f"the original code is.")
    sys.meta_path.append(Stubs())
    if args.full_size:
        family = FAMILIES[args.full_size]
        difference, largest = full_size(family, folders[family.code])
        print(f"{args.full_size}: largest difference {difference:.1e}, largest number {largest:.1f}")
        return 0
    lists = {size: {name: tensors(family, folders[family.code]) for name, family in families.items()}
             for size, families in (("full", FAMILIES), ("small", SMALL))}
    outputs = {f"{name}/{what}": tensor.contiguous() for name, family in SMALL.items()
               for what, tensor in answers(family, folders[family.code]).items()}
    args.out.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(args.out / "tensors.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(lists, separators=(",", ":")).encode())
    save_file(outputs, args.out / "outputs.safetensors")
    for name, found in lists["full"].items():
        print(f"{name:16} {len(found):5} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
