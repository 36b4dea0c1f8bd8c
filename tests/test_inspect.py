"""ldm.inspect: what it says of files and folders, and that its account of the tensors is true."""
import json

import diffusers
import pytest
import tiny
import torch
from checkpoints import FAMILIES, checkpoint, parts_of, write_file, write_folder
from safetensors.torch import load_file, save_file

import ldm
from ldm.weights import detect

pytestmark = pytest.mark.usefixtures("no_network")

KINDS = {"SD 1.5": "Stable Diffusion 1.x", "SD 1.5 inpaint": "Stable Diffusion 1.x inpainting",
         "SD 2.1 base": "Stable Diffusion 2.x base", "SD 2.1": "Stable Diffusion 2.x",
         "SD 2 inpaint": "Stable Diffusion 2.x inpainting", "SDXL base": "Stable Diffusion XL base",
         "SDXL refiner": "Stable Diffusion XL refiner"}


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    parts = parts_of("SD 1.5")
    state = checkpoint("SD 1.5", parts)
    return parts, state, write_file(tmp_path_factory.mktemp("file") / "model.safetensors", state)


def assert_complete(report, names):
    """Every tensor is accounted for, once."""
    assert sorted([*report.used, *report.ignored, *report.unknown]) == sorted(names) == sorted(report.account)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    state  = checkpoint(family, parts_of(family))
    file   = write_file(tmp_path / "model.safetensors", state)
    report = ldm.inspect(file)
    assert report.what == f"{KINDS[family]}: a single-file checkpoint in LDM names"
    assert report.prediction == ("v_prediction" if family == "SD 2.1" else "epsilon")
    if family.startswith("SD 2.1"):
        assert "norm1.bias has a standard deviation of" in report.evidence
    assert_complete(report, state)
    assert (report.unknown, report.problems, report.ema) == ([], [], False)
    assert report.size == sum(t.nbytes for t in state.values())
    assert sum(report.dtypes.values()) == len(state)


def test_the_account_is_true(tmp_path):
    """What is said to be used suffices, and all of it is needed."""
    state = checkpoint("SD 2.1", parts_of("SD 2.1"))
    file  = write_file(tmp_path / "model.safetensors", state)
    used  = ldm.inspect(file).used
    assert len(used) < len(state) - 10                      # the last layer of the text encoder, and tables
    write_file(tmp_path / "used.safetensors", {name: state[name] for name in used})
    a, b = (ldm.load(path, device="cpu").text.model for path in (file, tmp_path / "used.safetensors"))
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())
    for lost in (used[0], used[-1]):
        write_file(tmp_path / "lost.safetensors", {name: state[name] for name in used if name != lost})
        assert ldm.inspect(tmp_path / "lost.safetensors").problems
        with pytest.raises(ValueError, match=r"missing|lacks"):
            ldm.load(tmp_path / "lost.safetensors")


def test_what_is_printed(sd1, tmp_path):
    _, state, _ = sd1
    prefix = "model.diffusion_model."
    ema    = {f"model_ema.diffusion_model{k.removeprefix(prefix).replace('.', '')}": t.half()
              for k, t in state.items() if k.startswith(prefix)}
    junk   = {"junk.weight": torch.ones(2), "model.diffusion_model.junk": torch.ones(2)}
    report = ldm.inspect(write_file(tmp_path / "a.safetensors", {**state, **ema, **junk}))
    assert_complete(report, [*state, *ema, *junk])
    assert report.unknown == list(junk)
    assert report.ema
    assert report.problems == ["unet has 1 unknown tensors: junk"]
    text = str(report)
    for line in (f"file       {tmp_path / 'a.safetensors'} ({report.size:,} bytes)",
                 "what       Stable Diffusion 1.x: a single-file checkpoint in LDM names",
                 "prediction epsilon: what its family predicts, and the file has no key v_pred",
                 "EMA        yes: ldm.load(…, ema=True) reads it",
                 f"dtypes     {len(state) + 1} float32, {len(ema)} float16, 1 int64",
                 f"tensors    {len(ema)} used: unet",
                 f"tensors    {len(ema) + 1} ignored: a second U-Net, of running averages (EMA)",
                 "tensors    2 unknown", "unknown    junk.weight", "unknown    model.diffusion_model.junk",
                 "problem    unet has 1 unknown tensors: junk"):
        assert line in text.splitlines()


def test_names_do_not_command_the_terminal(sd1, tmp_path):
    _, state, _ = sd1
    path   = write_file(tmp_path / "a.safetensors", {**state, "\x1b]0;owned\x07.weight": torch.zeros(1)})
    report = ldm.inspect(path)
    assert report.unknown == ["\x1b]0;owned\x07.weight"]
    assert "\\x1b]0;owned\\x07.weight" in str(report)
    assert "\x1b" not in str(report)


def test_tensors_of_another_shape_are_unknown(sd1, tmp_path):
    _, state, _ = sd1
    name   = "model.diffusion_model.middle_block.0.in_layers.2.bias"
    report = ldm.inspect(write_file(tmp_path / "a.safetensors", {**state, name: torch.ones(3)}))
    assert report.unknown == [name]
    assert "unet lacks 1 tensors: mid_block.resnets.0.conv1.bias" in report.problems


def test_weights_that_are_whole_numbers_do_not_fit(sd1, tmp_path):
    """As quantised ones of other programs are."""
    _, state, _ = sd1
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    file = write_file(tmp_path / "a.safetensors", {**state, name: state[name].to(torch.int8)})
    assert ldm.inspect(file).unknown == [name]
    with pytest.raises(ValueError, match=r"1 of whole numbers: mid_block\.resnets\.0.* \(torch\.int8\)"):
        ldm.load(file, device="cpu")


def test_pickles(sd1, tmp_path):
    _, state, path = sd1
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "a.ckpt")
    ours, theirs = ldm.inspect(tmp_path / "a.ckpt"), ldm.inspect(path)
    assert ours.account == theirs.account
    assert ours.what == theirs.what


def test_parts_alone(sd1, tmp_path):
    parts, state, _ = sd1
    for name, prefix, what in (
            ("unet", "model.diffusion_model.", "Stable Diffusion 1.x: a U-Net in LDM names"),
            ("vae",  "first_stage_model.",     "an autoencoder in LDM names")):
        bare   = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        report = ldm.inspect(write_file(tmp_path / f"{name}.safetensors", bare))
        assert report.what == what
        assert report.account == dict.fromkeys(bare, f"used: {name}")
    vae = parts["vae"].state_dict()
    save_file(vae, tmp_path / "diffusers.safetensors")
    report = ldm.inspect(tmp_path / "diffusers.safetensors")
    assert report.what == "an autoencoder with 4 latent channels"
    assert report.account == dict.fromkeys(vae, "used: vae")
    save_file(diffusers.AutoencoderTiny().state_dict(), tmp_path / "tiny.safetensors")
    report = ldm.inspect(tmp_path / "tiny.safetensors")
    assert (report.what, report.ignored, report.unknown) == ("a tiny autoencoder", [], [])


@pytest.mark.parametrize(("name", "what"), [
    ("lora_unet_down_blocks_0.lora_up.weight",   "a LoRA"),
    ("control_model.input_hint_block.0.weight",  "a ControlNet in LDM names"),
    ("conv_in.weight time_embedding.x",          "a U-Net with 2 input channels"),
    ("clip_g clip_l",                            "a textual inversion"),
    ("quite.other.weight",                       "something unknown"),
])
def test_files_of_something_else(tmp_path, name, what):
    state  = {part: torch.ones(3, 2) for part in name.split()}
    save_file(state, tmp_path / "a.safetensors")
    report = ldm.inspect(tmp_path / "a.safetensors")
    assert (report.what, report.prediction) == (what, None)
    assert_complete(report, state)
    assert report.used == []
    assert "ldm reads checkpoints of Stable Diffusion 1.x, 2.x and XL" in report.problems[0]


def test_a_checkpoint_without_one_of_its_parts(sd1, tmp_path):
    _, state, _ = sd1
    unet = {k: t for k, t in state.items() if k.startswith("model.diffusion_model.")}
    report = ldm.inspect(write_file(tmp_path / "a.safetensors", unet))
    assert report.account == dict.fromkeys(unet, "used: unet")
    assert report.problems == ["there is no vae", "there is no text_encoder"]


def test_an_xl_without_its_second_text_encoder(tmp_path):
    state = checkpoint("SDXL base", parts_of("SDXL base"))
    path  = write_file(tmp_path / "a.safetensors", {k: t for k, t in state.items()
                                                    if not k.startswith("conditioner.embedders.1.")})
    assert ldm.inspect(path).problems == ["there is no text_encoder_2"]
    with pytest.raises(ValueError, match=r"has no text_encoder_2, only .*; use a complete file"):
        ldm.load(path)


def test_a_unet_for_another_task(tmp_path):
    folder = tiny.write(tmp_path / "8 channels", in_channels=8)
    assert ldm.inspect(folder).problems == ["unet has 8 input channels, for a task that ldm does not know"]
    for fine in ({"in_channels": 9}, {"in_channels": 16, "out_channels": 16}):
        assert ldm.inspect(tiny.write(tmp_path / str(fine), **fine)).problems == []


def test_a_folder_that_does_not_say_what_its_unet_predicts(tmp_path):
    folder = tiny.write(tmp_path / "a")
    file   = folder / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    del config["prediction_type"]
    file.write_text(json.dumps(config))
    report = ldm.inspect(folder)
    assert (report.prediction, report.evidence) == (
        "epsilon", "scheduler_config.json does not say; this is the default")


def test_a_vector_that_is_not_of_text_and_sizes_makes_no_xl():
    """Stable Diffusion 2.1's unCLIP has the field, too."""
    config = {"projection_class_embeddings_input_dim": 2048, "class_embed_type": "projection",
              "cross_attention_dim": 1024, "use_linear_projection": True, "in_channels": 4}
    assert detect.find_family(config, "v_prediction", "a").name == "Stable Diffusion 2.x"


def test_a_folder_of_something_else(tmp_path):
    save_file({"controlnet_cond_embedding.conv_in.weight": torch.ones(1)},
              tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    report = ldm.inspect(tmp_path)
    assert (report.what, report.used) == ("a folder of a ControlNet", [])
    assert "is a ControlNetModel, which ldm does not have" in report.problems[0]


def test_folders(sd1, tmp_path):
    parts, _, _ = sd1
    folder = write_folder(tmp_path / "model", "SD 1.5", parts)
    file   = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "epsilon"}))
    report = ldm.inspect(folder)
    assert report.what == "Stable Diffusion 1.x: a folder in Hugging Face layout"
    assert (report.prediction, report.evidence) == ("epsilon", "scheduler_config.json")
    names = [f"{part}/{name}" for part, module in parts.items() for name in module.state_dict()]
    assert sorted(report.used) == sorted(names)
    assert (report.ignored, report.unknown, report.problems) == ([], [], [])
    for part, what in (("unet", "a U-Net with 4 input channels"),
                       ("vae", "an autoencoder with 4 latent channels"),
                       ("text_encoder", "a CLIP text encoder of width 64")):
        report = ldm.inspect(folder / part)
        assert report.what == f"a folder of {what}"
        assert sorted(report.used) == sorted(parts[part].state_dict())
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), "junk": torch.ones(1)}, weights)
    assert ldm.inspect(folder).unknown == ["vae/junk"]


def test_what_cannot_be_read(tmp_path, sd1):
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        ldm.inspect(tmp_path / "lost.safetensors")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        ldm.inspect(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(sd1[2].read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated"):
        ldm.inspect(tmp_path / "a.safetensors")
