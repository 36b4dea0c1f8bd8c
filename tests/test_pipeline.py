"""ldm.load: what it makes of a folder, and what it says of one that it cannot use."""
import json
import shutil

import pytest
import tiny
import torch

import ldm


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


def test_a_scheduler_that_there_is_none_of_is_replaced_with_a_warning(copy):
    edit(copy / "scheduler/scheduler_config.json", _class_name="UniPCMultistepScheduler")
    with pytest.warns(UserWarning, match="UniPCMultistepScheduler.*taking 'dpmpp_2m'"):
        assert ldm.load(copy).defaults.scheduler == "dpmpp_2m"


@pytest.mark.parametrize(("part", "fields", "words"), [
    ("unet/config.json", {"class_embed_type": "timestep"},                "class_embed_type = 'timestep'"),
    ("unet/config.json", {"cross_attention_dim": 48},                     "of another shape.*attn2.to_k"),
    ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 4},   "down_block_types"),
    ("vae/config.json",  {"act_fn": "relu"},                              "act_fn = 'relu'"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"},     "beta_schedule = 'sigmoid'"),
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"},    "Stable Diffusion XL"),
])
def test_files_that_do_not_fit_are_named(copy, part, fields, words):
    edit(copy / part, **fields)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        ldm.load(copy)


def test_devices_and_dtypes_that_there_are_none_of(model):
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        ldm.load(model, dtype="int8")
    with pytest.raises(ValueError, match="device is 'quux'; use 'cpu'"):
        ldm.load(model, device="quux")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' was asked for"):
            ldm.load(model, device="cuda")


@pytest.mark.gpu
def test_the_same_picture_on_the_gpu(model):
    host, gpu = (ldm.sample("a cat", ldm.load(model, device=device, dtype="float32"), scheduler="euler_a",
                            steps=10, seed=3, output_type="pt").cpu() for device in ("cpu", "cuda"))
    assert (host - gpu).abs().max() < 1e-3
