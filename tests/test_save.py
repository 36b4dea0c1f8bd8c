"""Saving: a folder from which diffusers makes the same picture, and from which ldm loads the same model."""
import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from checkpoints import checkpoint, parts_of
from oracles import SD, SDXL_VAE, TINY_TAESD, UNETS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import ldm
from ldm.models import TinyVAE, TinyVAEConfig, UNetConfig, VAEConfig
from ldm.weights import load_tokenizer, read_json

# Family, fields of the U-Net that differ, task of diffusers' pipeline, its class in model_index.json.
MODELS = {
    "SD 1.5":            ("SD 1.5", {}, "sample", "StableDiffusionPipeline"),
    "SD 1.5 inpainting": ("SD 1.5", {"in_channels": 9}, "inpaint", "StableDiffusionInpaintPipeline"),
    "LCM":               ("SD 1.5", {"time_cond_proj_dim": 16}, "sample", "LatentConsistencyModelPipeline"),
    "SD 2.1":            ("SD 2.1", {}, "sample", "StableDiffusionPipeline"),
    "XL base":           ("SDXL base", {}, "sample", "StableDiffusionXLPipeline"),
    "XL refiner":        ("SDXL refiner", {}, "img2img", "StableDiffusionXLImg2ImgPipeline"),
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
INPUTS  = {"sample": {"height": 64, "width": 64}, "img2img": {"image": PICTURE, "strength": 0.6},
           "inpaint": {"image": PICTURE, "mask_image": PICTURE.convert("L"), "height": 64, "width": 64}}


def tensors(pipeline):
    """All tensors of a pipeline, by part and name."""
    text  = pipeline.text
    parts = {"unet": pipeline.unet, "vae": pipeline.vae,
             **({"first": text.first.model, "second": text.second.model} if hasattr(text, "first")
                else {"first": text.model})}
    return {f"{part}.{name}": tensor for part, module in parts.items()
            for name, tensor in module.state_dict().items()}


def same_model(a, b):
    """Everything but the name, bit for bit."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for part in ("prediction", "defaults", "zero_empty"):
        assert getattr(a, part) == getattr(b, part)
    assert np.array_equal(a.schedule.betas, b.schedule.betas)
    assert a.vae.config == b.vae.config
    assert a.unet.config == b.unet.config


def their_picture(folder, kind, task="sample"):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == kind
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3),
                output_type="np", **INPUTS[task]).images


@pytest.mark.parametrize("model", MODELS)
def test_diffusers_makes_the_same_picture_and_ldm_loads_the_same_model(tmp_path, model):
    family, unet, task, kind = MODELS[model]
    a, b   = tmp_path / "a", tmp_path / "b"
    config = tiny.write(a, family, **unet) / "scheduler/scheduler_config.json"
    if model == "LCM":
        config.write_text(json.dumps({**SD, "_class_name": "LCMScheduler"}))
    scheduler = json.loads(config.read_text())["_class_name"]
    index     = json.loads((a / "model_index.json").read_text())
    (a / "model_index.json").write_text(json.dumps(
        {**index, "_class_name": kind, "scheduler": ["diffusers", scheduler]}))
    before = ldm.load(a, device="cpu")
    before.save(b)
    assert np.abs(their_picture(a, kind, task) - their_picture(b, kind, task)).max() <= 1e-5
    same_model(before, ldm.load(b, device="cpu"))


def test_the_embedded_model(tmp_path):
    pipe = ldm.load(device="cpu")
    pipe.save(tmp_path / "shapes")
    same_model(pipe, ldm.load(tmp_path / "shapes", device="cpu"))
    theirs = tiny.their_pictures(tmp_path / "shapes", "dpmpp_2m", [5], prompt="a red circle",
                                 height=64, width=64, num_inference_steps=3)
    ours   = ldm.sample("a red circle", pipe, steps=3, seed=5, guidance_scale=7.5, height=64, width=64,
                        output_type="np")
    assert np.abs(ours - theirs).max() <= 1e-4


def test_another_autoencoder_is_saved_with_the_model(tmp_path):
    torch.manual_seed(0)
    taesd = TinyVAE(TinyVAEConfig.from_hf(TINY_TAESD)).eval()
    pipe  = replace(ldm.load(tiny.write(tmp_path / "a"), device="cpu"), vae=taesd)
    pipe.save(tmp_path / "b")
    same_model(pipe, ldm.load(tmp_path / "b", device="cpu"))
    theirs = tiny.their_pictures(tmp_path / "b", "ddim", [5], prompt="a cat", height=64, width=64,
                                 num_inference_steps=5)
    ours   = ldm.sample("a cat", pipe, scheduler="ddim", steps=5, seed=5, output_type="np")
    assert np.abs(ours - theirs).max() <= 1e-4


def test_what_was_changed_is_saved(tmp_path):
    pipe = ldm.load(tiny.write(tmp_path / "a", prediction="v_prediction"), device="cpu")
    defaults = replace(pipe.defaults, scheduler="heun", steps=7, guidance_scale=2.5, width=96)
    pipe = replace(pipe, schedule=ldm.NoiseSchedule.cosine(), prediction="sample", defaults=defaults,
                   scheduler_config={**pipe.scheduler_config, "prediction_type": "sample"})
    pipe.save(tmp_path / "b")
    same_model(pipe, ldm.load(tmp_path / "b", device="cpu"))
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "b/scheduler")
    assert scheduler.config.prediction_type == "sample"
    assert np.allclose(scheduler.betas, pipe.schedule.betas, rtol=1e-6)


@pytest.mark.parametrize("schedule", [ldm.NoiseSchedule.scaled_linear().zero_terminal_snr(),
                                      ldm.NoiseSchedule.scaled_linear(steps=500),
                                      ldm.NoiseSchedule.scaled_linear(steps=1500)],
                         ids=["ends in pure noise", "500 times", "1500 times"])
def test_another_schedule_is_saved_as_diffusers_reads_it(tmp_path, schedule):
    pipe = ldm.load(tiny.write(tmp_path / "a", prediction="v_prediction"), device="cpu")
    pipe = replace(pipe, schedule=schedule)
    pipe.save(tmp_path / "b")
    same_model(pipe, ldm.load(tmp_path / "b", device="cpu"))
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "b/scheduler",
                                                              timestep_spacing="trailing")
    theirs.set_timesteps(5)
    assert np.allclose(theirs.sigmas, pipe.schedule.sigmas(5, "trailing"), rtol=1e-4)


def test_a_model_of_parts_without_files(tmp_path):
    made = ldm.load(tiny.write(tmp_path / "a"), device="cpu")
    pipe = ldm.Pipeline(made.text, made.unet, made.vae, ldm.NoiseSchedule.scaled_linear(), "v_prediction")
    pipe.save(tmp_path / "b")
    same_model(pipe, ldm.load(tmp_path / "b", device="cpu"))
    assert np.isfinite(their_picture(tmp_path / "b", "StableDiffusionPipeline")).all()
    assert diffusers.DDIMScheduler.from_pretrained(tmp_path / "b/scheduler").config.clip_sample is False


# -- dtypes and files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("loaded", "saved", "unet", "vae"), [
    ("float32",  None,       torch.float32,  torch.float32),
    ("float16",  None,       torch.float16,  torch.float32),        # the autoencoder stays in float32
    ("float32", "float16",   torch.float16,  torch.float16),
    ("float32", torch.bfloat16, torch.bfloat16, torch.bfloat16),
])
def test_dtypes(tmp_path, loaded, saved, unet, vae):
    pipe = ldm.load(tiny.write(tmp_path / "a", "SDXL base"), device="cpu", dtype=loaded)
    pipe.save(tmp_path / "b", saved)
    for part, dtype in (("unet", unet), ("vae", vae), ("text_encoder", unet), ("text_encoder_2", unet)):
        file, = (tmp_path / "b" / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert read_json(tmp_path / "b/text_encoder/config.json")["dtype"] == str(unet).removeprefix("torch.")
    kept = next(pipe.unet.parameters()).dtype                       # saving leaves the model as it is
    assert kept == getattr(torch, loaded)


def test_text_encoders_have_the_names_of_published_files(tmp_path):
    ldm.load(tiny.write(tmp_path / "a", "SDXL base"), device="cpu").save(tmp_path / "b")
    for part in ("text_encoder", "text_encoder_2"):
        tensors = load_file(tmp_path / f"b/{part}/model.safetensors")
        assert all(name.startswith("text_") for name in tensors)
        tokenizer = part.replace("text_encoder", "tokenizer")
        assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "b" / tokenizer).iterdir()}
        before, after = (load_tokenizer(tmp_path / folder / tokenizer) for folder in "ab")
        ids = [tokenizer("a red cat!", padding="max_length").input_ids for tokenizer in (before, after)]
        assert ids[0] == ids[1]


def test_numbers_that_float16_does_not_hold_are_not_saved_as_infinity(tmp_path):
    pipe = ldm.load(tiny.write(tmp_path / "a"), device="cpu")
    pipe.unet.conv_in.bias.data[0] = 1e5
    with pytest.raises(ValueError, match=r"conv_in\.bias has numbers too large for torch\.float16"):
        pipe.save(tmp_path / "b", "float16")
    assert not list(tmp_path.glob("b*"))
    pipe.save(tmp_path / "b", "bfloat16")


def test_nothing_is_written_over(tmp_path):
    folder = tiny.write(tmp_path / "a")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pipe   = ldm.load(folder, device="cpu")
    with pytest.raises(FileExistsError, match="a exists and is not empty; nothing is written over"):
        pipe.save(folder)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        pipe.save(tmp_path / "file")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    pipe.save(tmp_path / "empty")
    pipe.save(tmp_path / "new" / "deep")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    pipe.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "other/model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "file", "link", "new", "other"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, error):
    pipe = ldm.load(tiny.write(tmp_path / "a"), device="cpu")

    def fail(*_, **__):
        raise error
    monkeypatch.setattr("ldm.pipeline.weights.write_tokenizer", fail)
    with pytest.raises(type(error)):
        pipe.save(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_parts_that_have_no_place_in_a_folder(tmp_path):
    pipe = ldm.load(tiny.write(tmp_path / "a"), device="cpu")
    with pytest.raises(ValueError, match=r"Only a model of our own parts .* not one of function, UNet, VAE"):
        replace(pipe, text=lambda prompts: None).save(tmp_path / "b")
    with pytest.raises(ValueError, match="`penultimate` must be as `load` sets it"):
        replace(pipe, text=replace(pipe.text, penultimate=True)).save(tmp_path / "b")
    pipe.unet.conv_out = nn.Sequential(pipe.unet.conv_out)
    with pytest.raises(ValueError, match=r"This UNet is not as its config says \(conv_out\.0\.bias\): save"):
        pipe.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_pipeline_of_diffusers_for_xl_inpainting(tmp_path):
    ldm.load(tiny.write(tmp_path / "a", "SDXL base", in_channels=9), device="cpu").save(tmp_path / "b")
    index = read_json(tmp_path / "b/model_index.json")
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"
    assert (index["force_zeros_for_empty_prompt"], index["requires_aesthetics_score"]) == (True, False)


# -- configs -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", UNETS)
def test_unet_configs_come_back(name):
    config = UNetConfig.from_hf(UNETS[name])
    assert UNetConfig.from_hf(config.to_hf()) == config
    with torch.device("meta"):
        theirs, again = map(diffusers.UNet2DConditionModel.from_config, (UNETS[name], config.to_hf()))
    # One number stands there for a list of equal ones; and published files do not say all that is false.
    different = {field for field in again.config
                 if field[0] != "_" and again.config[field] != theirs.config[field]}
    if name == "SD 1.5 inpaint":                        # the published 32, which nobody believes
        assert (theirs.config.sample_size, again.config.sample_size) == (32, 64)
        different.remove("sample_size")
    assert different <= {"attention_head_dim", "transformer_layers_per_block", "upcast_attention"}
    assert bool(again.config.upcast_attention) == bool(theirs.config.upcast_attention)
    assert {name: tensor.shape for name, tensor in theirs.state_dict().items()} == {
            name: tensor.shape for name, tensor in again.state_dict().items()}


def test_a_unet_that_config_json_cannot_describe():
    with pytest.raises(ValueError, match="mid_depth is 3 and depth"):
        UNetConfig(depth=(1, 1, 1, 1), mid_depth=3).to_hf()


def test_autoencoder_configs_come_back():
    for config in (VAEConfig(), VAEConfig.from_hf(SDXL_VAE),
                   VAEConfig(channels=(8, 16), layers=1, latent_channels=16, groups=4, scaling_factor=0.36,
                             shift_factor=0.1, force_upcast=False, quant_conv=False, post_quant_conv=False,
                             mid_attention=False)):
        assert VAEConfig.from_hf(config.to_hf()) == config
    for config in (TinyVAEConfig(), TinyVAEConfig.from_hf(TINY_TAESD), TinyVAEConfig(shift_factor=2.0)):
        assert TinyVAEConfig.from_hf(config.to_hf()) == config


# -- from a single file --------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["SD 2.1", "SDXL base"])
def test_a_checkpoint_becomes_a_folder_for_diffusers(tmp_path, no_network, family):
    file  = tmp_path / "model.ckpt"
    parts = parts_of(family)
    torch.save({"state_dict": checkpoint(family, parts), "callbacks": {Image.Image: PICTURE}}, file)
    pipe  = ldm.load(file, device="cpu")
    pipe.save(tmp_path / "b")
    same_model(pipe, ldm.load(tmp_path / "b", device="cpu"))
    theirs = tiny.their_pictures(tmp_path / "b", "euler", [5], prompt="a cat, 1995 ☂", height=64, width=64,
                                 num_inference_steps=5, guidance_scale=4.0)
    ours   = ldm.sample("a cat, 1995 ☂", pipe, scheduler="euler", steps=5, seed=5, guidance_scale=4.0,
                        height=64, width=64, output_type="np")
    assert np.abs(ours - theirs).max() <= 1e-4
