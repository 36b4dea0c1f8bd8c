"""ldm.load: what it makes of a folder, and what it says of one that it cannot use."""
import json
import shutil
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import oracles
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm import pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_parts_have_the_asked_dtype_but_an_autoencoder_that_overflows(copy):
    half = ldm.load(copy, device="cpu", dtype="bfloat16")
    parts = (half.unet, half.vae, half.text.model)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.bfloat16}
    for upcast, expected in ((False, torch.float16), (True, torch.float32)):
        edit(copy / "vae/config.json", force_upcast=upcast)
        pipe = ldm.load(copy, device="cpu", dtype=torch.float16)
        assert next(pipe.vae.parameters()).dtype == expected
        assert next(pipe.unet.parameters()).dtype == torch.float16


def test_the_fastest_device_there_is_and_float16_on_cuda_alone(monkeypatch):
    for cuda, mps, wanted in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        device = pipeline._device(None)
        assert device.type == wanted
        assert pipeline._dtype(None, device) == (torch.float16 if wanted == "cuda" else torch.float32)


def test_a_model_in_bfloat16_gives_nearly_the_same_picture(model):
    full, half = (ldm.sample("a cat", ldm.load(model, device="cpu", dtype=dtype), steps=4, spacing="trailing",
                             guidance_scale=2.0, output_type="pt") for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().mean() < 0.02


def test_defaults_and_prediction_come_from_the_files(copy):
    edit(copy / "scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler",
         prediction_type="v_prediction", timestep_spacing="trailing")
    edit(copy / "model_index.json", _ldm={"steps": 12, "guidance_scale": 3.0})
    pipe = ldm.load(copy)
    assert (pipe.prediction, pipe.name) == ("v_prediction", str(copy))
    assert pipe.defaults == ldm.pipeline.Defaults("dpmpp_2m", 12, 3.0, 64, 64)
    for wrong in ({"steps": 12, "sampler": "heun"}, ["heun"]):
        edit(copy / "model_index.json", _ldm=wrong)
        with pytest.raises(ValueError, match=r"heun.*there may be values for guidance_scale, height, sched"):
            ldm.load(copy)


def test_a_local_folder_needs_no_network(model, no_network):
    assert ldm.load(model).name == str(model)


def test_encode_and_decode_are_the_autoencoders_own_in_float32(model):
    pipe    = ldm.load(model, device="cpu", dtype="bfloat16")
    picture = torch.rand(2, 3, 32, 40) * 2 - 1
    mean, std = pipe.encode(picture)
    assert mean.shape == std.shape == (2, 4, 4, 5)
    decoded = pipe.decode(mean)
    assert decoded.shape == picture.shape
    assert mean.dtype == std.dtype == decoded.dtype == torch.float32
    with torch.inference_mode():
        expected = pipe.vae.decode(mean.bfloat16()).float()
    torch.testing.assert_close(decoded, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler"])
def test_old_scheduler_files_are_amended_as_by_the_pipelines_of_diffusers(copy, kind):
    """Those of 1.x and 2.x set steps_offset to 1 and clip_sample to False, whatever the file says."""
    config = {name: value for name, value in oracles.SD.items()
              if name not in ("steps_offset", "clip_sample")}
    (copy / "scheduler/scheduler_config.json").write_text(
        json.dumps({**config, "_class_name": kind, "skip_prk_steps": True}))
    edit(copy / "model_index.json", scheduler=["diffusers", kind])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy)
    same   = {"prompt": "a red cat", "height": 64, "width": 64}
    expected = theirs(**same, num_inference_steps=7, generator=torch.Generator().manual_seed(5),
                      output_type="np").images
    with warnings.catch_warnings(action="error"):
        pipe = ldm.load(copy, device="cpu")
    found = ldm.sample(model=pipe, **same, steps=7, seed=5, output_type="np")
    assert np.abs(found - expected).max() <= 1e-5
    unamended = replace(pipe, scheduler_config={**pipe.scheduler_config, "steps_offset": 0})
    assert np.abs(ldm.sample(model=unamended, **same, steps=7, seed=5, output_type="np") - found).max() > 1e-3


def test_a_scheduler_that_there_is_none_of_is_replaced_with_a_warning(copy):
    edit(copy / "scheduler/scheduler_config.json", _class_name="UniPCMultistepScheduler")
    with pytest.warns(UserWarning, match="UniPCMultistepScheduler.*taking 'dpmpp_2m'"):
        assert ldm.load(copy).defaults.scheduler == "dpmpp_2m"


@pytest.mark.parametrize(("part", "fields", "words"), [
    ("text_encoder/config.json", {"hidden_act": "nope"},                  "describes no text encoder .*nope"),
    ("unet/config.json", {"class_embed_type": "timestep"},                "class_embed_type = 'timestep'"),
    ("unet/config.json", {"cross_attention_dim": 48},                     "of another shape.*attn2.to_k"),
    ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 4},   "down_block_types"),
    ("vae/config.json",  {"act_fn": "relu"},                              "act_fn = 'relu'"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"},     "beta_schedule = 'sigmoid'"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v-pred"},    "'v-pred'"),
    ("unet/config.json", {"addition_embed_type": "text_time"},            "text_time', but no projection_"),
])
def test_files_that_do_not_fit_are_named(copy, part, fields, words):
    edit(copy / part, **fields)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        ldm.load(copy)


def test_devices_and_dtypes_that_there_are_none_of(model):
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        ldm.load(model, dtype="int8")
    with pytest.raises(ValueError, match="dtype is 'float8_e4m3fn'"):
        ldm.load(model, dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match="device 'xpu' was asked for"):
        ldm.load(model, device="xpu")
    with pytest.raises(ValueError, match="device is 'quux'; use 'cpu'"):
        ldm.load(model, device="quux")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' was asked for"):
            ldm.load(model, device="cuda")


def test_a_gpu_beyond_the_last_one(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device 'cuda:2' was asked for, but there are 2, counted from 0"):
        ldm.load(model, device="cuda:2")


@pytest.mark.gpu
def test_the_same_picture_on_the_gpu(model):
    host, gpu = (ldm.sample("a cat", ldm.load(model, device=device, dtype="float32"), scheduler="euler_a",
                            steps=10, seed=3, output_type="pt").cpu() for device in ("cpu", "cuda"))
    assert (host - gpu).abs().max() < 1e-3


# ── Numbers beyond float16 ──────────────────────────────────────────────────────────────────────────────────

def times_in_file(path, factor, *names):
    tensors = load_file(path)
    save_file({name: tensor * (factor if name in names else 1) for name, tensor in tensors.items()}, path)


@pytest.fixture
def large(copy):
    """A model whose autoencoder has activations near a million, as Stable Diffusion XL's has large ones."""
    times_in_file(copy / "vae/diffusion_pytorch_model.safetensors", 2e5,
                  "encoder.conv_in.weight", "decoder.conv_in.weight")
    return copy


def test_the_autoencoder_overflows_in_float16_and_therefore_is_not_in_it(large):
    picture, z = torch.rand(1, 3, 32, 40) * 2 - 1, torch.randn(1, 4, 4, 5)
    pipes = {dtype: ldm.load(large, device="cpu", dtype=dtype)
             for dtype in ("float32", "float16", "bfloat16")}
    with torch.inference_mode():
        full = pipes["float32"].decode(z)
        assert pipes["float32"].vae.decoder.conv_in(z / 0.18215).abs().max() > 1e6
        assert full.std() > 0.01
        torch.testing.assert_close(pipes["float16"].decode(z), full)
        torch.testing.assert_close(pipes["bfloat16"].decode(z), full, rtol=0, atol=0.05)
        torch.testing.assert_close(pipes["float16"].encode(picture), pipes["float32"].encode(picture))


def test_an_overflow_is_an_error_that_names_the_remedy_and_not_a_black_picture(large):
    edit(large / "vae/config.json", force_upcast=False)                 # a file that promises too much
    pipe  = ldm.load(large, device="cpu", dtype="float16")
    words = "autoencoder gave numbers that are not finite.*65504.*dtype='bfloat16' or 'float32'"
    with torch.inference_mode():
        with pytest.raises(FloatingPointError, match=words):
            pipe.decode(torch.randn(1, 4, 4, 5))
        with pytest.raises(FloatingPointError, match=words):
            pipe.encode(torch.ones(1, 3, 32, 40))


def test_an_overflow_in_the_unet_is_one_too(copy):
    times_in_file(copy / "unet/diffusion_pytorch_model.safetensors", 2e5, "conv_in.weight")
    arguments = {"steps": 2, "spacing": "trailing", "output_type": "latent"}
    ldm.sample("a cat", ldm.load(copy, device="cpu", dtype="bfloat16"), **arguments)
    with pytest.raises(FloatingPointError, match="U-Net gave numbers that are not finite"):
        ldm.sample("a cat", ldm.load(copy, device="cpu", dtype="float16"), **arguments)
