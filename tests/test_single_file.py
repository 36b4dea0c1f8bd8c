"""ldm.load and ldm.load_vae from single files: every family, against the same model in a folder."""
import json
import shutil
import warnings
from dataclasses import replace
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, checkpoint, ldm_unet, ldm_vae, open_clip, parts_of, write_file, write_folder
from diffusers.loaders import single_file_utils as theirs
from oracles import SD_VAE, SDXL_VAE, UNETS
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import ldm
from ldm.models import UNet, UNetConfig, VAEConfig
from ldm.noise_schedule import NoiseSchedule
from ldm.weights import detect, rename_ldm_unet, rename_ldm_vae, rename_open_clip
from ldm.weights.load import skeleton
from ldm.weights.vocabulary import clip_tokenizer

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch):
    """Made once for all tests that only compare: half a second each."""
    monkeypatch.setattr("ldm.weights.sources.clip_tokenizer", cached_tokenizer)


cached_tokenizer = cache(clip_tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family → (its parts, its tensors by their names in a single file, that file); each is made once."""
    known = {}

    def make(family):
        if family not in known:
            parts = parts_of(family)
            state = checkpoint(family, parts)
            path  = write_file(tmp_path_factory.mktemp("files") / "model.safetensors", state)
            known[family] = parts, state, path
        return known[family]
    return make


def encoders(pipe):
    return [pipe.text.first, pipe.text.second] if hasattr(pipe.text, "first") else [pipe.text]


def modules(pipe):
    return [pipe.unet, pipe.vae, *(text.model for text in encoders(pipe))]


def assert_same(module, state):
    assert module.state_dict().keys() == state.keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def assert_same_models(ours, others):
    for a, b in zip(modules(ours), modules(others), strict=True):
        assert_same(a, b.state_dict())


class ModelCheckpoint:
    """A callback, for a pickle to name."""


# -- whole models --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_same_model_as_the_folder(made, tmp_path, family):
    parts, _, path = made(family)
    file   = ldm.load(path, device="cpu")
    folder = ldm.load(write_folder(tmp_path / "folder", family, parts), device="cpu")
    assert_same_models(file, folder)
    assert file.unet.config == folder.unet.config
    assert file.vae.config == folder.vae.config
    assert np.array_equal(file.schedule.betas, folder.schedule.betas)
    for field in ("prediction", "defaults", "zero_empty"):
        assert getattr(file, field) == getattr(folder, field), field
    for a, b in zip(encoders(file), encoders(folder), strict=True):
        assert a.penultimate == b.penultimate
        for field in ("hidden_act", "num_attention_heads", "num_hidden_layers", "eos_token_id",
                      "layer_norm_eps"):
            assert getattr(a.model.config, field) == getattr(b.model.config, field), field
    with torch.no_grad():
        ours, others = (pipe.condition(["a CAT, naïve!", ""], 64, 64) for pipe in (file, folder))
    assert torch.equal(ours.context, others.context)
    assert (ours.vector is None) == ("XL" not in family)
    assert ours.vector is None or torch.equal(ours.vector, others.vector)


@pytest.mark.parametrize("half", [False, True])
def test_a_pickle_with_a_callback_and_steps(made, tmp_path, half):
    """As Lightning writes it: the weights in `state_dict`, beside objects of its own."""
    _, state, path = made("SD 1.5")
    stored = {k: t.half() if half and t.is_floating_point() else t for k, t in state.items()}
    torch.save({"global_step": 7, "callbacks": {ModelCheckpoint: {"best": ModelCheckpoint()}},
                "state_dict": {"state_dict": stored}}, tmp_path / "model.ckpt")
    pipe = ldm.load(tmp_path / "model.ckpt", device="cpu")
    full = ldm.load(path, device="cpu")
    assert {p.dtype for module in modules(pipe) for p in module.parameters()} == {torch.float32}
    for a, b in zip(modules(pipe), modules(full), strict=True):
        assert_same(a, {k: t.half().float() if half else t for k, t in b.state_dict().items()})


def test_float8_files_are_cast(made, tmp_path):
    _, state, _ = made("SD 1.5")
    unet = {k: t for k, t in state.items() if "diffusion_model." in k}
    path = write_file(tmp_path / "model.safetensors",
                      {**state, **{k: t.to(torch.float8_e4m3fn) for k, t in unet.items() if t.ndim > 1}})
    pipe = ldm.load(path, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    weight = unet["model.diffusion_model.out.2.weight"]
    assert torch.equal(pipe.unet.conv_out.weight, weight.to(torch.float8_e4m3fn).to(torch.bfloat16))


def test_stable_diffusion_2_in_the_layout_of_the_later_code(made, tmp_path):
    parts, _, path = made("SD 2.1")
    file = write_file(tmp_path / "model.safetensors", checkpoint("SD 2.1", parts, sgm=True))
    assert_same_models(ldm.load(file, device="cpu"), ldm.load(path, device="cpu"))


def test_stable_diffusion_1_before_text_model_was_in_the_names(made, tmp_path):
    _, state, path = made("SD 1.5")
    old  = {k.replace("transformer.text_model.", "transformer."): t for k, t in state.items()}
    assert old.keys() != state.keys()
    file = write_file(tmp_path / "model.safetensors", old)
    assert_same_models(ldm.load(file, device="cpu"), ldm.load(path, device="cpu"))


def test_turbo_is_known_by_the_names_of_its_files(made, tmp_path):
    for family, name, scheduler in (("SD 2.1 base", "sd_turbo.safetensors", "euler"),
                                    ("SDXL base", "sd_xl_turbo_1.0_fp16.safetensors", "euler_a")):
        (tmp_path / name).symlink_to(made(family)[2])
        pipe = ldm.load(tmp_path / name, device="cpu")
        assert pipe.defaults == ldm.pipeline.Defaults(scheduler, 1, 1.0, 512, 512)
        assert pipe.scheduler_config["timestep_spacing"] == "trailing"


def test_lightning_is_known_by_the_names_of_its_files(made, tmp_path):
    for name, steps, prediction in (("sdxl_lightning_4step.safetensors", 4, "epsilon"),
                                    ("sdxl_lightning_8step.safetensors", 8, "epsilon"),
                                    ("sdxl_lightning_1step_x0.safetensors", 1, "sample")):
        (tmp_path / name).symlink_to(made("SDXL base")[2])
        pipe = ldm.load(tmp_path / name, device="cpu")
        assert pipe.defaults == ldm.pipeline.Defaults("euler", steps, 1.0, 1024, 1024)
        assert pipe.scheduler_config["timestep_spacing"] == "trailing"
        assert pipe.prediction == prediction
        assert pipe.zero_empty
    assert ldm.load(tmp_path / name, device="cpu", prediction="epsilon").prediction == "epsilon"


@pytest.mark.parametrize("family", ["SD 1.5", "SD 2.1 base", "SDXL base"])
def test_lcm_is_known_by_its_guidance_embedding(made, tmp_path, family):
    _, state, _ = made(family)
    weight = torch.randn(32, 256)
    file   = write_file(tmp_path / "a.safetensors",
                        {**state, "model.diffusion_model.time_embed.cond_proj.weight": weight})
    pipe = ldm.load(file, device="cpu")
    assert pipe.unet.config.guidance_dim == 256
    assert torch.equal(pipe.unet.time_embedding.cond_proj.weight, weight)
    assert (pipe.defaults.scheduler, pipe.defaults.steps) == ("lcm", 4)


# -- ε or v --------------------------------------------------------------------------------------------------
NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(("std", "prediction"), [(0.0895, "epsilon"), (0.0905, "v_prediction")])
def test_a_statistic_tells_v_from_epsilon(made, tmp_path, std, prediction):
    _, state, _ = made("SD 2.1 base")
    bias = torch.randn(32)
    bias = (bias - bias.mean()) / bias.std(correction=0) * std + 0.3
    path = write_file(tmp_path / "a.safetensors", {**state, NORM: bias})
    pipe = ldm.load(path, device="cpu")
    assert pipe.prediction == pipe.scheduler_config["prediction_type"] == prediction
    assert pipe.defaults.height == (768 if prediction == "v_prediction" else 512)
    other = "epsilon" if prediction == "v_prediction" else "v_prediction"
    assert ldm.load(path, device="cpu", prediction=other).prediction == other


def test_keys_tell_v_and_a_terminal_snr_of_zero(made, tmp_path):
    _, state, path = made("SDXL base")
    assert ldm.load(path, device="cpu").prediction == "epsilon"
    marked = write_file(tmp_path / "a.safetensors",
                        {**state, "v_pred": torch.empty(0), "ztsnr": torch.empty(0)})
    pipe   = ldm.load(marked, device="cpu")
    assert pipe.prediction == "v_prediction"
    assert np.array_equal(pipe.schedule.betas, NoiseSchedule.scaled_linear().zero_terminal_snr().betas)
    row = ldm.schedulers.find(pipe.defaults.scheduler)
    assert row.sigmas(pipe.schedule, 20, config=pipe.scheduler_config)[0] == pipe.schedule.sigma_max


@pytest.mark.parametrize(("said", "prediction"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_the_metadata_of_the_model_spec_tell_v(made, tmp_path, said, prediction):
    _, state, _ = made("SDXL base")
    path = tmp_path / "a.safetensors"
    save_file({k: t.clone() for k, t in state.items()}, path, {"modelspec.prediction_type": said})
    assert ldm.load(path, device="cpu").prediction == prediction
    assert ("modelspec" in ldm.inspect(path).evidence) == (said == "v")
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")                      # which has no such header
    assert ldm.load(tmp_path / "a.ckpt", device="cpu").prediction == "epsilon"


def test_prediction_of_a_folder_can_be_overridden(made, tmp_path):
    folder = write_folder(tmp_path / "folder", "SD 1.5", made("SD 1.5")[0])
    pipe   = ldm.load(folder, device="cpu", prediction="v_prediction")
    assert pipe.prediction == pipe.scheduler_config["prediction_type"] == "v_prediction"
    with pytest.raises(ValueError, match="prediction is 'v'; there are 'epsilon', 'v_prediction'"):
        ldm.load(folder, prediction="v")


# -- averages, junk and holes --------------------------------------------------------------------------------
def averaged(state):
    """What LitEma keeps: the names of the U-Net's weights without dots."""
    return {f"model_ema.diffusion_model{k.removeprefix('model.diffusion_model.').replace('.', '')}": t + 1
            for k, t in state.items() if k.startswith("model.diffusion_model.")}


def test_averaged_weights_on_request(made, tmp_path):
    _, state, path = made("SD 1.5")
    full  = write_file(tmp_path / "full.safetensors", {**state, **averaged(state)})
    plain = ldm.load(path, device="cpu")
    assert_same_models(ldm.load(full, device="cpu"), plain)
    ema   = ldm.load(full, device="cpu", ema=True)
    assert_same(ema.unet, {k: t + 1 for k, t in plain.unet.state_dict().items()})
    with pytest.raises(ValueError, match=r"lacks 6\d\d of 6\d\d averaged weights .*Leave ema out"):
        ldm.load(path, ema=True)
    with pytest.raises(ValueError, match="ema=True is for single files"):
        ldm.load(ema=True)


def test_what_belongs_to_no_part_is_left_out_with_a_warning(made, tmp_path):
    _, state, path = made("SD 1.5")
    junk = ["embedding_manager.x", "junk.weight", "cond_stage_model.logit_scale", "first_stage_model.loss.a"]
    file = write_file(tmp_path / "a.safetensors", {**state, **dict.fromkeys(junk, torch.ones(1))})
    with pytest.warns(UserWarning, match=r"2 tensors that belong to no part.*: embedding_manager\.x, junk"):
        assert_same_models(ldm.load(file, device="cpu"), ldm.load(path, device="cpu"))


def test_what_belongs_to_a_part_must_fit(made, tmp_path):
    _, state, _ = made("SD 1.5")
    junk = {"model.diffusion_model.junk": torch.ones(1)}
    file = write_file(tmp_path / "a.safetensors", {**state, **junk})
    with pytest.raises(ValueError,
                       match=r"a\.safetensors \(unet\) do not fit.*\n  1 unknown to the model: junk"):
        ldm.load(file)
    lost = {k: t for k, t in state.items() if "middle_block.0.in_layers.2.bias" not in k}
    with pytest.raises(ValueError, match=r"1 missing from the file: mid_block\.resnets\.0\.conv1\.bias"):
        ldm.load(write_file(tmp_path / "b.safetensors", lost))


def without(state, prefix):
    return {k: t for k, t in state.items() if not k.startswith(prefix)}


def test_files_without_one_of_the_parts(made, tmp_path):
    _, state, path = made("SD 1.5")
    no_vae  = write_file(tmp_path / "no_vae.safetensors", without(state, "first_stage_model."))
    with pytest.raises(ValueError, match=r"it has no vae, only .*unet.*; give one with vae="):
        ldm.load(no_vae)
    assert_same_models(ldm.load(no_vae, device="cpu", vae=path), ldm.load(path, device="cpu"))
    no_text = write_file(tmp_path / "no_text.safetensors", without(state, "cond_stage_model."))
    with pytest.raises(ValueError, match=r"it has no text_encoder, only .*; use a complete file"):
        ldm.load(no_text)
    holes = write_file(tmp_path / "holes.safetensors", without(state, "model.diffusion_model.out.2"))
    with pytest.raises(ValueError, match=r"The unet in .* lacks 'out\.2\.weight'"):
        ldm.load(holes)


@pytest.mark.parametrize(("name", "words"), [
    ("lora_unet_down_blocks_0.lora_up.weight",                  "looks like a LoRA; ldm reads checkpoints"),
    ("control_model.input_hint_block.0.weight",                 "looks like a ControlNet in LDM names"),
    ("model.diffusion_model.joint_blocks.0.attn.qkv.weight",    "looks like a Stable Diffusion 3"),
    ("double_blocks.0.img_attn.qkv.weight",                     "looks like a FLUX"),
    ("text_model.embeddings.token_embedding.weight",            "looks like a CLIP text encoder of width 2"),
    ("quite.other.weight",                                      "looks like something unknown"),
])
def test_files_of_something_else_are_named(tmp_path, name, words):
    save_file({name: torch.ones(3, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=words):
        ldm.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("mark", ["noise_augmentor.data_mean", "edm_mean"])
def test_checkpoints_of_models_that_work_otherwise_are_refused(made, tmp_path, mark):
    _, state, _ = made("SD 1.5")
    with pytest.raises(ValueError, match=r"looks like .*(unCLIP|EDM's formulation)"):
        ldm.load(write_file(tmp_path / "a.safetensors", {**state, mark: torch.ones(1)}))


def test_a_distilled_unet_with_irregular_levels_is_refused(made, tmp_path):
    _, state, _ = made("SDXL base")
    lost = without(state, "model.diffusion_model.input_blocks.7.1.transformer_blocks.2.")
    with pytest.raises(ValueError, match="layers of different width or depth"):
        ldm.load(write_file(tmp_path / "a.safetensors", lost))


def test_files_that_are_damaged_or_not_there(made, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(made("SD 1.5")[2].read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.safetensors \([\d,]+ bytes\) is truncated"):
        ldm.load(file)
    for name in ("b.ckpt", "b.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
        with pytest.raises(ValueError, match="Git LFS pointer"):
            ldm.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="There is no folder or file"):
        ldm.load("lost.safetensors")                                # and does not ask the Hub
    with pytest.raises(ValueError, match="variant='fp16' is for folders and repositories"):
        ldm.load(made("SD 1.5")[2], variant="fp16")


# -- autoencoders alone --------------------------------------------------------------------------------------
def test_load_vae(made, tmp_path):
    parts, state, path = made("SDXL base")
    expected = parts["vae"].state_dict()
    save_file(expected, tmp_path / "diffusers.safetensors")
    prefix = "first_stage_model."
    bare   = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    write_file(tmp_path / "bare.safetensors", {**bare, "loss.logvar": torch.ones(())})
    write_file(tmp_path / "prefixed.safetensors", {f"{prefix}{k}": t for k, t in bare.items()})
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    write_folder(tmp_path / "model", "SDXL base", parts)
    for name, factor in (("diffusers.safetensors", 0.18215), ("bare.safetensors", 0.18215),
                         ("bare.ckpt", 0.18215), ("prefixed.safetensors", 0.18215),
                         (path, 0.13025), ("model", 0.13025), ("model/vae", 0.13025)):
        vae = ldm.load_vae(tmp_path / name, device="cpu")
        assert_same(vae, expected)
        assert vae.config.scaling_factor == factor, name
    scaled = ldm.load_vae(tmp_path / "bare.safetensors", scaling_factor=0.13025)
    assert scaled.config.scaling_factor == 0.13025
    pipe = ldm.load(path, device="cpu", vae=tmp_path / "bare.safetensors")      # its scale is the model's own
    assert pipe.vae.config == ldm.load(path, device="cpu").vae.config
    half = ldm.load(path, device="cpu", dtype="bfloat16", vae=tmp_path / "bare.safetensors")
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}
    assert ldm.load_vae(path, scaling_factor=0.18215).config.scaling_factor == 0.13025      # of a whole file
    assert ldm.load_vae(tmp_path / "model", scaling_factor=0.18215).config.scaling_factor == 0.13025
    config = tmp_path / "model/vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": None}))
    assert ldm.load_vae(tmp_path / "model", scaling_factor=0.13025).config.scaling_factor == 0.13025
    with pytest.warns(UserWarning, match=r"scales its latents by 0\.18215, but"):    # as diffusers has it
        ldm.load(path, device="cpu", vae=tmp_path / "model")
    with pytest.raises(ValueError, match=r"like an autoencoder in LDM names.*read it with ldm\.load_vae"):
        ldm.load(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="it has no vae"):
        ldm.load_vae(write_file(tmp_path / "no.safetensors", without(state, "first_stage_model.")))
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        ldm.load_vae(tmp_path)


def test_the_variant_is_that_of_another_autoencoder_too(made, tmp_path):
    parts, _, _ = made("SD 1.5")
    model, other = (write_folder(tmp_path / name, "SD 1.5", parts) for name in ("model", "other"))
    shutil.copy(model / "unet/diffusion_pytorch_model.safetensors",
                model / "unet/diffusion_pytorch_model.fp16.safetensors")
    weights = other / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    save_file(parts["vae"].state_dict(), tmp_path / "file.safetensors")
    for vae in (other, other / "vae", tmp_path / "file.safetensors"):
        with warnings.catch_warnings(action="ignore"):                  # the text encoder has no such variant
            assert_same(ldm.load(model, variant="fp16", vae=vae, device="cpu").vae, parts["vae"].state_dict())


def test_the_vae_alone_stays_in_float32_where_it_overflows(made):
    path = made("SDXL base")[2]
    assert next(ldm.load_vae(path, device="cpu", dtype="float16").parameters()).dtype == torch.float32
    assert next(ldm.load_vae(path, device="cpu", dtype="bfloat16").parameters()).dtype == torch.bfloat16


def test_load_the_tiny_autoencoder(tmp_path):
    torch.manual_seed(0)
    oracle   = diffusers.AutoencoderTiny()
    expected = oracle.state_dict()
    oracle.save_pretrained(tmp_path / "taesd")
    save_file(expected, tmp_path / "taesd.safetensors")
    halves: dict = {"encoder": {}, "decoder": {}}                   # the author's two files
    for name, tensor in expected.items():
        half, _, number, rest = name.split(".", 3)
        halves[half][f"{int(number) + (half == 'decoder')}.{rest}"] = tensor
    for half, state in halves.items():
        save_file(state, tmp_path / f"taesd_{half}.safetensors")
    for name in ("taesd", "taesd.safetensors", "taesd_encoder.safetensors", "taesd_decoder.safetensors"):
        vae = ldm.load_vae(tmp_path / name, device="cpu", scaling_factor=0.18215)
        assert_same(vae, expected)
        assert vae.config.scaling_factor == 1                       # it takes the latents as they are scaled
    (tmp_path / "taesd_encoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"one half .*taesd_encoder\.safetensors is missing"):
        ldm.load_vae(tmp_path / "taesd_decoder.safetensors")


# -- full size, without numbers ------------------------------------------------------------------------------
def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


@pytest.mark.parametrize("family", UNETS)
def test_the_architecture_of_full_size_unets(family):
    """Told from names and shapes, it is that of the published config.json; every tensor finds its place."""
    expected   = replace(UNetConfig.from_hf(UNETS[family]), sample_size=None)
    _, wanted  = skeleton(lambda: UNet(expected))
    state      = ldm_unet(wanted)
    assert len(state) == len(wanted)
    config     = detect.unet_config(state)
    assert UNetConfig.from_hf(config) == expected
    assert shapes(rename_ldm_unet(state, wanted)) == shapes(wanted)
    found = detect.find_family(config, "v_prediction" if family == "SD 2.1" else "epsilon", "a.safetensors")
    assert found.name == {"SD 1.5":         "Stable Diffusion 1.x",
                          "SD 1.5 inpaint": "Stable Diffusion 1.x inpainting",
                          "SD 1.5 LCM": "Stable Diffusion 1.x LCM",
                          "SD 2.1": "Stable Diffusion 2.x", "SDXL base": "Stable Diffusion XL base",
                          "SDXL refiner": "Stable Diffusion XL refiner"}[family]


@pytest.mark.parametrize("config", [SD_VAE, SDXL_VAE])
def test_the_architecture_of_full_size_autoencoders(config):
    with torch.device("meta"):
        wanted = diffusers.AutoencoderKL.from_config(config).state_dict()
    state  = ldm_vae(wanted)
    assert len(state) == len(wanted)
    factor = {"scaling_factor": config.get("scaling_factor")}
    assert VAEConfig.from_hf({**detect.vae_config(state), **factor}) == VAEConfig.from_hf(config)
    assert shapes(rename_ldm_vae(state, wanted)) == shapes(wanted)


@pytest.mark.parametrize(("kind", "width", "layers", "stored"), [
    (CLIPTextModel, 1024, 23, 24), (CLIPTextModel, 1024, 23, 23),
    (CLIPTextModelWithProjection, 1280, 32, 32)],
    ids=["SD 2.x", "SD 2.x made from a folder", "SDXL"])
def test_the_architecture_of_full_size_open_clip(kind, width, layers, stored):
    xl     = kind is CLIPTextModelWithProjection
    config = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64,
              "projection_dim": width, "hidden_act": "gelu"}
    with torch.device("meta"):
        full  = CLIPTextModelWithProjection(CLIPTextConfig(**config, num_hidden_layers=stored))
        state = open_clip(full.state_dict())
    found = detect.text_config(state, xl=xl)
    assert found["architectures"] == [kind.__name__]
    assert {**found, **config, "num_hidden_layers": layers} == {"projection_dim": width, **found}
    _, wanted = skeleton(lambda: kind(CLIPTextConfig.from_dict(found)))
    assert shapes(rename_open_clip(state, wanted)) == shapes(wanted)


# -- the names, by diffusers' own converters -----------------------------------------------------------------
@pytest.mark.parametrize("family", ["SD 1.5", "SDXL base", "SDXL refiner"])
def test_diffusers_reads_the_same_names(made, family):
    """The single-file names of these tests are those that diffusers' converters know."""
    parts, state, _ = made(family)
    unet = theirs.convert_ldm_unet_checkpoint(dict(state), {**parts["unet"].config})
    assert unet.keys() == parts["unet"].state_dict().keys()
    assert all(torch.equal(tensor, unet[name]) for name, tensor in parts["unet"].state_dict().items())
    vae  = theirs.convert_ldm_vae_checkpoint(dict(state), {**parts["vae"].config})
    assert vae.keys() == parts["vae"].state_dict().keys()
    for name, tensor in parts["vae"].state_dict().items():
        assert torch.equal(tensor, vae[name].reshape(tensor.shape)), name


# -- the vocabulary ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "ids"), [     # by OpenAI's own tokenizer (github.com/openai/CLIP)
    ("a photograph of an astronaut riding a horse", [320, 8853, 539, 550, 18376, 6765, 320, 4558]),
    ("It's naïve — 東京の猫 🐕, 50%?", [585, 568, 1097, 35689, 563, 2005, 48338, 21078, 105, 21575, 163, 234,
                                     360, 2074, 243, 267, 276, 271, 4, 286]),
    ("  two   spaces\tand\nlines", [1237, 9006, 537, 3418]),
    ("don't we'll 1234 a.b", [847, 713, 649, 1342, 272, 273, 274, 275, 320, 269, 321]),
])
def test_the_vocabulary_of_the_package_is_clips(text, ids):
    for pad, padding in (("<|endoftext|>", 49407), ("!", 0)):
        tokenizer = clip_tokenizer(pad)
        tokens    = tokenizer(text, padding="max_length", max_length=77).input_ids
        assert len(tokenizer) == 49408
        assert tokenizer.model_max_length == 77
        assert tokens == [49406, *ids, 49407] + [padding] * (75 - len(ids))


def test_loading_leaves_the_file_alone(made):
    _, state, path = made("SD 1.5")
    pipe = ldm.load(path, device="cpu")
    with torch.no_grad():
        for module in modules(pipe):
            for parameter in module.parameters():
                parameter.add_(1)
    stored = load_file(path)
    assert all(torch.equal(stored[k], t) for k, t in state.items())
