"""Against the original code of Stable Diffusion: the tensors of its files, and what its networks compute.

scripts/original.py asked it; tests/data/original/ has the answers. The small networks get their weights by a
rule from the original names, in a checkpoint file that `ldm.load` reads.
"""
import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import SD_VAE, SDXL_VAE, UNETS
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldm
from ldm import weights
from ldm.models import UNetConfig, VAEConfig
from ldm.sizes import Sizes
from ldm.weights import detect

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
import original

TENSORS   = json.loads(gzip.decompress((original.OUT / "tensors.json.gz").read_bytes()))
ANSWERS   = load_file(original.OUT / "outputs.safetensors")
PUBLISHED = {**UNETS, "SD 2 inpaint": {**UNETS["SD 2.1"], "in_channels": 9}}
CLIP_L    = (768, 3072, 12, 12, "quick_gelu")       # widths, layers, heads, activation
BIG_G     = (1280, 5120, 32, 20, "gelu")
ENCODERS  = {"SD 1.5": [CLIP_L], "SD 1.5 inpaint": [CLIP_L], "SDXL base": [CLIP_L, BIG_G],
             "SD 2.1": [(1024, 4096, 23, 16, "gelu")], "SD 2 inpaint": [(1024, 4096, 23, 16, "gelu")],
             "SDXL refiner": [BIG_G]}

TOLERANCE = 2e-5        # on numbers up to 8; found are 4e-6
OF_SINES  = 1e-4        # of sizes up to 1024 times frequencies, whose last bit, 2⁻²⁴, is the CPU's: 5e-5


# ── Full size: names and shapes ─────────────────────────────────────────────────────────────────────────────

@pytest.fixture(params=original.FAMILIES)
def full(request):
    """(family, its parts, the names that belong to none), without memory."""
    state = {name: torch.empty(shape, device="meta")
             for name, shape in TENSORS["full"][request.param].items()}
    return request.param, *detect.split(state)


def test_every_tensor_has_its_place(full):
    family, parts, _ = full
    xl   = "XL" in family
    unet = UNetConfig.from_hf(detect.unet_config(parts["unet"]))
    vae  = VAEConfig.from_hf(detect.vae_config(parts["vae"]))
    text = [detect.text_config(parts[part], xl=xl) for part in sorted(parts) if part.startswith("text")]

    published_unet, published_vae = (UNetConfig.from_hf(PUBLISHED[family]),
                                     VAEConfig.from_hf(SDXL_VAE if xl else SD_VAE))
    assert replace(unet, sample_size=published_unet.sample_size) == published_unet
    assert replace(vae, scaling_factor=published_vae.scaling_factor) == published_vae
    assert [tuple(config[field] for field in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                              "num_attention_heads", "hidden_act")) for config in text] \
        == ENCODERS[family]

    configs = {"unet": PUBLISHED[family], "vae": SD_VAE,
               **dict(zip(("text_encoder", "text_encoder_2"), text, strict=False))}
    assert parts.keys() == {"unet", "vae", *list(configs)[2:]}
    renames = {"unet": weights.rename_ldm_unet, "vae": weights.rename_ldm_vae}
    for name, tensors in parts.items():
        part = weights.Part(family, configs[name], tensors)
        ours = weights.load_part(name, part, device="meta").state_dict()        # strict: or it raises
        if name in renames:
            assert renames[name](tensors, ours).keys() == ours.keys()
            assert len(tensors) == len(ours)                                    # no two have one name


def test_what_has_no_place_is_known(full):
    family, parts, others = full
    averaged = sum("EMA" in what for what in others.values())
    tables   = sum("noise schedule" in what for what in others.values())
    assert averaged == (0 if "XL" in family else len(parts["unet"]) + 2)        # two: its decay, its age
    assert tables == (1 if "XL" in family else 12)
    assert averaged + tables == len(others)


# ── Small: what they compute ────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module", params=original.SMALL)
def small(request, tmp_path_factory):
    """(family, our pipeline of a small checkpoint file with the original names, the inputs)."""
    file = tmp_path_factory.mktemp("original") / "small.safetensors"
    save_file({name: original.weight(name, shape)
               for name, shape in TENSORS["small"][request.param].items()}, file)
    yield request.param, ldm.load(file, device="cpu"), original.inputs(original.SMALL[request.param])
    file.unlink()


xl_only    = pytest.mark.parametrize("small", ["SDXL base", "SDXL refiner"], indirect=True)
all_but_xl = pytest.mark.parametrize("small", ["SD 1.5", "SD 1.5 inpaint", "SD 2.1"], indirect=True)


def difference(family: str, what: str, ours: Tensor) -> float:
    theirs = ANSWERS[f"{family}/{what}"]
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def test_unet(small):
    family, pipe, given = small
    ours = pipe.unet(given["x"], given["t"], given["context"], given.get("y"))
    assert difference(family, "unet", ours) < TOLERANCE


def test_autoencoder(small):
    family, pipe, given = small
    factor    = original.SMALL[family].scale_factor
    mean, std = pipe.encode(given["pictures"])
    moments   = torch.cat([mean / factor, 2 * (std / factor).log()], dim=1)
    assert difference(family, "moments", moments) < TOLERANCE
    assert difference(family, "decoded", pipe.decode(given["latents"])) < TOLERANCE


def test_context(small):
    family, pipe, _ = small
    assert difference(family, "context", pipe.text(original.PROMPTS).context[:, ::7]) < TOLERANCE


@xl_only
def test_vector(small):
    family, pipe, _ = small
    sizes = Sizes(**original.SIZES, aesthetic_score=original.SCORE)
    found  = pipe.condition(original.PROMPTS, 64, 64, sizes).vector
    errors = (found - ANSWERS[f"{family}/vector"]).abs()
    assert errors[:, :128].max() < TOLERANCE                # the pooled text
    assert errors[:, 128:].max() < OF_SINES


@xl_only
def test_denoiser(small):
    family, pipe, given = small
    denoiser = ldm.Denoiser(lambda x, *_: torch.ones_like(x), pipe.schedule, pipe.prediction)
    nothing  = ldm.Conditioning(torch.zeros(1, 1, 1))
    ours     = [denoiser(x[None], pipe.schedule.sigma(t), nothing)
                for x, t in zip(given["x"], original.TIMES, strict=True)]
    assert difference(family, "x0", torch.cat(ours)) < TOLERANCE


@all_but_xl
def test_averaged_weights(small):
    _, pipe, _ = small
    for name, tensor in weights.open_source(pipe.name, ema=True).part("unet").tensors.items():
        averaged = f"model_ema.diffusion_model{name.replace('.', '')}"
        assert torch.equal(tensor, original.weight(averaged, tensor.shape))
