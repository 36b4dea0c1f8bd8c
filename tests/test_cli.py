"""The command line: with a stand-in for the model first, then end to end with the embedded one."""
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ldm
from ldm import cli, images
from ldm.pipeline import EMBEDDED

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


@dataclass(frozen=True)
class StandInDefaults:
    scheduler: str = "euler"
    steps: int = 25
    guidance_scale: float = 3.0
    height: int = 128
    width: int = 128


@dataclass(frozen=True)
class StandIn:
    name: str | None
    defaults: StandInDefaults = field(default_factory=StandInDefaults)


class Calls(list):
    """What ldm.load and ldm.sample were called with; `error` is raised instead of sampling."""
    error: Exception | None = None


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """ldm.load and ldm.sample are stand-ins that write down their arguments; cwd is an empty folder."""
    calls = Calls()

    def load(name=None, **options):
        calls.append(("load", name, options))
        return StandIn(name)

    def stand_in(task):
        def make(prompt, *inputs, progress, seed, num_images, **options):
            *inputs, model = inputs
            options |= {"seed": seed, "num_images": num_images}
            calls.append((task, prompt, *inputs, model.name, options, progress))
            if calls.error:
                raise calls.error
            return [Image.new("RGB", (8, 8), (seed + i, 0, 0)) for i in range(num_images)]
        return make

    monkeypatch.setitem(vars(ldm), "load", load)
    for task in ("sample", "img2img", "inpaint"):
        monkeypatch.setitem(vars(ldm), task, stand_in(task))
    monkeypatch.chdir(tmp_path)
    return calls


def seed_of(path):
    """The stand-in paints the seed in red."""
    return Image.open(path).getpixel((0, 0))[0]


def run(*words):
    assert cli.main(words) == 0


def test_one_picture_records_the_defaults_of_its_model(calls, capsys):
    run("a red circle", "-o", "circle.png")
    parameters = {"negative_prompt": "", "scheduler": "euler", "steps": 25, "guidance_scale": 3.0, "seed": 0,
                  "num_images": 1, "height": 128, "width": 128}
    assert calls == [("load", None, {"device": None}), ("sample", "a red circle", None, parameters, None)]
    assert images.read_parameters("circle.png") == {
        "ldm": ldm.__version__, "prompt": "a red circle", "model": None, "grid": False, **parameters}
    assert capsys.readouterr().out == "circle.png\n"


FLAGS = ("a cat", "--negative", "a dog", "--model", "here/sd15", "--scheduler", "heun", "--spacing", "karras",
         "--steps", "7", "--guidance", "2.5", "--height", "64", "--width", "96", "--variant", "fp16",
         "--revision", "main", "--device", "cpu", "--dtype", "bfloat16", "--seed", "5")


def test_every_flag_arrives_and_comes_back(calls):
    run(*FLAGS, "-o", "first.png", "--quiet")
    run("--from", "first.png", "-o", "second.png", "--device", "cpu", "--quiet")
    assert calls[0] == ("load", "here/sd15", {
        "device": "cpu", "variant": "fp16", "revision": "main", "dtype": "bfloat16"})
    assert calls[1] == ("sample", "a cat", "here/sd15", {
        "negative_prompt": "a dog", "scheduler": "heun", "spacing": "karras", "steps": 7,
        "guidance_scale": 2.5, "height": 64, "width": 96, "seed": 5, "num_images": 1}, False)
    assert calls[2:] == calls[:2]
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()


@pytest.fixture
def inputs(calls):
    """in.png, mask.png and new.png in the current folder, and the parameters of a call with none of them."""
    for name in ("in.png", "mask.png", "new.png"):
        Image.new("RGB", (8, 8)).save(name)
    return {"negative_prompt": "", "scheduler": "euler", "steps": 25, "guidance_scale": 3.0, "seed": 0,
            "num_images": 1}


def test_image_to_image(calls, inputs):
    """The picture's own size is kept: that of the model is not asked for."""
    run("a cat", "--image", "in.png", "-o", "a.png")
    run("a cat", "--image", "in.png", "--strength", "0.5", "--width", "64", "-n", "2", "-o", "b.png")
    run("--from", "b-1.png", "-o", "c.png")
    run("--from", "b-1.png", "--image", "new.png", "-o", "d.png")
    assert [call[:4] + call[5:] for call in calls if call[0] != "load"] == [
        ("img2img", "a cat", name, None, None) for name in ("in.png", "in.png", "in.png", "new.png")]
    assert [call[4] for call in calls if call[0] != "load"] == [
        {**inputs, "strength": 0.8},
        {**inputs, "strength": 0.5, "width": 64, "num_images": 2},
        *[{**inputs, "strength": 0.5, "width": 64, "seed": 1}] * 2]
    assert Path("c.png").read_bytes() == Path("b-1.png").read_bytes()
    assert images.read_parameters("d.png")["image"] == "new.png"


def test_inpainting(calls, inputs):
    flags = ("--padding", "16", "--feather", "4", "--invert", "--no-composite")
    run("a cat", "--image", "in.png", "--mask", "mask.png", "-o", "a.png")
    run("a cat", "--image", "in.png", "--mask", "mask.png", *flags, "-o", "b.png")
    run("--from", "b.png", "-o", "c.png")
    assert [call[:5] for call in calls if call[0] != "load"] == [
        ("inpaint", "a cat", "in.png", "mask.png", None)] * 3
    own = {"padding": 16, "feather": 4, "invert": True, "composite": False}
    assert [call[5] for call in calls if call[0] != "load"] == [
        {**inputs, "strength": 1.0}, *[{**inputs, **own, "strength": 1.0}] * 2]
    assert Path("c.png").read_bytes() == Path("b.png").read_bytes()


def test_a_picture_given_over_a_file_brings_its_own_size_and_a_mask_its_strength(calls, inputs):
    run("a cat", "-o", "a.png")
    run("--from", "a.png", "--image", "in.png", "-o", "b.png")
    run("--from", "b.png", "--mask", "mask.png", "-o", "c.png")
    options = [call[-2] for call in calls if call[0] != "load"]
    assert options[0]["height"] == 128
    assert options[1:] == [{**inputs, "strength": 0.8}, {**inputs, "strength": 1.0}]


def test_what_a_file_remembers_can_be_switched_off(calls, inputs):
    run("a cat", "--image", "in.png", "--mask", "mask.png", "--invert", "--ema", "-o", "a.png")
    run("--from", "a.png", "--no-invert", "--no-ema", "-o", "b.png")
    assert [call[-2]["invert"] for call in calls if call[0] != "load"] == [True, False]
    assert [call[2]["ema"] for call in calls if call[0] == "load"] == [True, False]


def test_a_picture_that_has_moved_is_missed_before_any_work(calls, inputs, capsys):
    run("a cat", "--image", "in.png", "-o", "a.png")
    Path("in.png").unlink()
    calls.clear()
    assert cli.main(["--from", "a.png", "-o", "b.png"]) == 1
    assert capsys.readouterr().err == ("ldm: error: --image in.png: there is no such file (a.png remembers "
                                       "it so; a flag here goes before that)\n")
    assert calls == []
    run("--from", "a.png", "--image", "new.png", "-o", "b.png")


def test_flags_need_each_other_over_a_file_too(calls, inputs, capsys):
    run("a cat", "-o", "a.png")
    assert cli.main(["--from", "a.png", "--strength", "0.5"]) == 1
    assert capsys.readouterr().err == "ldm: error: --strength needs --image\n"      # not the file's fault
    run("--from", "a.png", "--image", "in.png", "--strength", "0.5", "-o", "b.png")


def test_how_a_model_is_loaded(calls):
    flags = ("--vae", "other.ckpt", "--prediction", "v_prediction", "--ema", "--dtype", "float16")
    run("a cat", "--model", "a.ckpt", *flags, "-o", "a.png")
    run("--from", "a.png", "-o", "b.png")
    assert calls[0] == calls[2] == ("load", "a.ckpt", {
        "device": None, "vae": "other.ckpt", "prediction": "v_prediction", "ema": True, "dtype": "float16"})


def test_a_refiner_is_loaded_like_the_model(calls):
    run("a cat", "--model", "base", "--refiner", "second", "--handover", "0.7", "--dtype", "float16",
        "--variant", "fp16", "--vae", "other", "-o", "a.png")
    run("--from", "a.png", "-o", "b.png")
    loads = [call for call in calls if call[0] == "load"]
    assert loads[1] == ("load", "second", {"device": None, "dtype": "float16", "variant": "fp16"})
    assert loads[2:] == loads[:2]
    _, _, _, options, _ = calls[2]
    assert (options["refiner"].name, options["handover"]) == ("second", 0.7)
    assert images.read_parameters("b.png")["refiner"] == "second"


def test_flags_win_over_the_file(calls):
    run(*FLAGS, "-o", "first.png")
    run("a bird", "--from", "first.png", "--steps", "3", "--seed", "9", "-o", "second.png")
    _, prompt, _, options, _ = calls[-1]
    assert (prompt, options["steps"], options["seed"]) == ("a bird", 3, 9)
    assert (options["scheduler"], options["width"]) == ("heun", 96)
    assert images.read_parameters("second.png")["prompt"] == "a bird"


def test_each_of_several_pictures_can_be_made_again_alone(calls, capsys):
    run("a cat", "-n", "3", "--seed", "40", "-o", "cat.png")
    assert capsys.readouterr().out.split() == ["cat-0.png", "cat-1.png", "cat-2.png"]
    run("--from", "cat-2.png", "-o", "again.png")
    assert (calls[-1][3]["seed"], calls[-1][3]["num_images"]) == (42, 1)
    assert seed_of("again.png") == seed_of("cat-2.png") == 42


def test_a_grid_is_made_again_as_a_grid(calls):
    run("a cat", "-n", "4", "--seed", "10", "--grid", "-o", "sheet.png")
    run("--from", "sheet.png", "-o", "again.png")
    run("--from", "sheet.png", "--no-grid", "-o", "one.png")
    assert Path("again.png").read_bytes() == Path("sheet.png").read_bytes()
    assert Image.open("sheet.png").size == (20, 20)
    assert [seed_of(f"one-{i}.png") for i in range(4)] == [10, 11, 12, 13]


def test_without_a_name_nothing_is_overwritten(calls, capsys):
    Path("ldm-2.png").write_text("precious")
    run("a cat", "-n", "2")
    run("a cat")
    assert capsys.readouterr().out.split() == ["ldm-1.png", "ldm-3.png", "ldm-4.png"]
    assert Path("ldm-2.png").read_text() == "precious"


def test_a_name_that_is_given_is_replaced(calls):
    run("a cat", "--seed", "1", "-o", "cat.png")
    run("a cat", "--seed", "2", "-o", "cat.png")
    assert seed_of("cat.png") == 2


def test_quiet_is_quiet(calls, capsys):
    run("a cat", "--quiet")
    assert capsys.readouterr() == ("", "")


def test_a_warning_is_one_line(calls, capsys, monkeypatch):
    run("a cat", "-o", "cat.png")
    monkeypatch.setattr(ldm, "__version__", "9.0")
    run("--from", "cat.png", "-o", "again.png")
    assert capsys.readouterr().err.splitlines() == [
        "ldm: warning: cat.png was made by ldm 0.1.0 and this is 9.0: the picture may differ"]


@pytest.mark.parametrize(("words", "message"), [
    ((),                                 "give a prompt"),
    (("a", "red", "circle"),             "a prompt of several words is put in quotes"),
    (("a cat", "--stpes", "3"),          "not understood: --stpes"),
    (("a cat", "--steps", "many"),       "invalid int value: 'many'"),
    (("a cat", "-o", "cat.jpg"),         "must end in .png"),
    (("a cat", "-o", "no/cat.png"),      "there is no folder no"),
    (("a cat", "-o", "dir.png"),         "-o dir.png: this is a folder; name a file"),
    (("a cat", "--dtype", "float8"),     "invalid choice: 'float8'"),
    (("a cat", "--strength", "0.5"),     "--strength needs --image"),
    (("a cat", "--mask", "mask.png"),    "--mask needs --image"),
    (("a cat", "--image", "in.png"),     "--image in.png: there is no such file"),
    (("a cat", "--feather", "8"),        "--feather needs --mask"),
    (("a cat", "--handover", "0.5"),     "--handover needs --refiner"),
    (("inspect",),                       "ldm inspect: error: the following arguments are required: FILE"),
    (("inspect", "a", "b"),              "unrecognized arguments: b"),
    (("convert", "model.ckpt"),          "ldm convert: error: the following arguments are required: FOLDER"),
])
def test_wrong_flags_exit_with_2_before_any_work(words, message, calls, capsys):
    Path("dir.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert calls == []


@pytest.mark.parametrize("words", [(), ("-o", "cat.png")])
def test_a_folder_that_cannot_be_written_is_noticed_before_any_work(words, calls, capsys, monkeypatch):
    monkeypatch.setattr(cli.os, "access", lambda folder, mode: mode != os.W_OK)
    with pytest.raises(SystemExit):
        cli.main(["a cat", *words])
    assert "nothing can be written into the folder" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(("error", "message"), [
    (ValueError("steps must be\n  at least 1"),           "ldm: error: steps must be at least 1"),
    (FileNotFoundError(2, "No such file", "unet"),        "ldm: error: unet: No such file"),
    (torch.OutOfMemoryError("CUDA out of memory. Tr…"),   "ldm: error: out of memory: try fewer or smaller"),
    (torch.OutOfMemoryError("Out of memory for 4 picture(s); free are 1 GB. What helps: ldm.fast"),
     "ldm: error: Out of memory for 4 picture(s); free are 1 GB: try fewer or smaller"),
    (RuntimeError("alloc: can't allocate memory: you …"), "ldm: error: out of memory: try fewer or smaller"),
    (MemoryError(),                                       "ldm: error: out of memory: try fewer or smaller"),
    (KeyError("conv_in"),                                 "ldm: error: KeyError: 'conv_in' (--debug shows"),
])
def test_an_error_is_one_line(error, message, calls, capsys):
    calls.error = error
    assert cli.main(["a cat"]) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert not list(Path.cwd().iterdir())


def test_debug_shows_the_stack_trace(calls):
    calls.error = KeyError("conv_in")
    with pytest.raises(KeyError):
        cli.main(["a cat", "--debug"])


def test_control_c(calls, capsys):
    calls.error = KeyboardInterrupt()
    assert cli.main(["a cat"]) == 130
    assert capsys.readouterr().err == "ldm: stopped\n"


def test_a_file_without_parameters(calls, capsys):
    Image.new("RGB", (8, 8)).save("photo.png")
    assert cli.main(["--from", "photo.png"]) == 1
    assert capsys.readouterr().err.startswith("ldm: error: photo.png carries no parameters of ldm")


def test_a_file_of_a_later_version_with_parameters_unknown_here(calls, capsys):
    images.save_png(Image.new("RGB", (8, 8)), "later.png", {"ldm": "9.0", "prompt": "a cat", "mood": 0.5})
    assert cli.main(["--from", "later.png"]) == 1
    assert "was made by ldm 9.0 with mood" in capsys.readouterr().err


def test_list_schedulers(capsys):
    run("--list-schedulers")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(ldm.schedulers.SCHEDULERS)
    assert "PNDMScheduler" in next(line for line in lines if line.startswith("pndm "))


# -- the other commands --------------------------------------------------------------------------------------
def test_a_prompt_that_is_the_name_of_a_command(calls):
    run("--", "inspect")
    run("-q", "convert")
    assert [call[1] for call in calls if call[0] == "sample"] == ["inspect", "convert"]


def test_inspect_prints_the_report(capsys):
    run("inspect", str(EMBEDDED))
    assert capsys.readouterr().out == f"{ldm.inspect(EMBEDDED)}\n"


@pytest.mark.parametrize("flags", [(), ("--dtype", "float32"), ("--dtype", "bfloat16")])
def test_convert_keeps_the_dtype_of_the_file_unless_told(tmp_path, capsys, flags):
    run("convert", str(EMBEDDED), str(tmp_path / "new"), *flags)
    assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
    tensors = load_file(tmp_path / "new/unet/diffusion_pytorch_model.safetensors")
    wanted  = getattr(torch, flags[1]) if flags else torch.float16
    for name, tensor in ldm.load(device="cpu").unet.state_dict().items():
        assert tensors[name].dtype == wanted
        assert torch.equal(tensors[name], tensor.to(wanted))


def test_a_checkpoint_of_two_dtypes_is_converted_without_loss(tmp_path):
    """Rounding to the narrower of the two is only done where it is asked for."""
    folder = tiny.write(tmp_path / "a")
    file   = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    run("convert", str(folder), str(tmp_path / "b"), "-q")
    for part in ("unet", "vae"):
        before, after = (load_file(tmp_path / name / part / file.name) for name in "ab")
        assert all(torch.equal(after[name], tensor.float()) for name, tensor in before.items())


def test_another_autoencoder_is_converted_without_loss(tmp_path):
    precise = ldm.load_vae(EMBEDDED, device="cpu", dtype="float32")
    for p in precise.parameters():
        p.data += 1e-5                                                          # which float16 cannot hold
    replace(ldm.load(EMBEDDED, device="cpu"), vae=precise).save(tmp_path / "a")
    run("convert", str(EMBEDDED), str(tmp_path / "b"), "--vae", str(tmp_path / "a"), "-q")
    file = "vae/diffusion_pytorch_model.safetensors"
    given, converted = (load_file(tmp_path / name / file) for name in "ab")
    assert all(torch.equal(converted[name], tensor) for name, tensor in given.items())


def test_a_folder_with_nothing_but_a_variant_is_told_and_converted(tmp_path, capsys):
    folder = tiny.write(tmp_path / "a")
    for file in [*folder.rglob("*.safetensors")]:
        save_file({name: tensor.half() for name, tensor in load_file(file).items()},
                  file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    assert [*ldm.inspect(folder, "fp16").dtypes] == ["float16"]
    run("inspect", str(folder), "--variant", "fp16")
    assert capsys.readouterr().out == f"{ldm.inspect(folder, 'fp16')}\n"
    assert cli.main(["inspect", str(folder)]) == 1
    assert "There are those of fp16: give variant='fp16'." in capsys.readouterr().err
    run("convert", str(folder), str(tmp_path / "b"), "--variant", "fp16", "-q")
    for part in ("unet", "vae"):
        before = load_file(folder / part / "diffusion_pytorch_model.fp16.safetensors")
        after  = load_file(tmp_path / "b" / part / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_error_does_not_command_the_terminal():
    assert cli.explain(ValueError("lacks \x1b]0;owned\x07.weight")) == r"lacks \x1b]0;owned\x07.weight"


def test_errors_of_the_other_commands_are_one_line(tmp_path, capsys):
    for words, message in (
            (("inspect", str(tmp_path / "no.ckpt")), "ldm: error: There is no file or folder "),
            (("convert", str(tmp_path / "no.ckpt"), str(tmp_path / "b")), "ldm: error: There is no "),
            (("convert", str(EMBEDDED), str(EMBEDDED)), "ldm: error: ")):
        assert cli.main(words) == 1
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith(message)


def test_help_and_mistakes_load_no_torch():
    code = """
import sys
from ldm.cli import main
try:
    main(sys.argv[1:])
finally:
    print('torch' in sys.modules)"""
    for words in (["--help"], ["--version"], ["a", "b"], ["--from", "nowhere.png"], ["inspect", "--help"],
                  ["a", "--image", "nowhere.png"], ["convert", "a"]):
        result = subprocess.run([sys.executable, "-c", code, *words], env=ENVIRONMENT,
                                capture_output=True, text=True, check=False)
        assert result.stdout.splitlines()[-1] == "False", words


def command(*words, cwd):
    """The command as a user starts it, in a process of its own without a terminal."""
    return subprocess.run([sys.executable, "-m", "ldm", *words], cwd=cwd, env=ENVIRONMENT,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_the_embedded_model_paints_what_it_is_told(tmp_path):
    result = command("a red circle on a blue background", "-o", "circle.png", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "circle.png\n", "")
    image = Image.open(tmp_path / "circle.png")
    red, green, blue = image.resize((3, 3), Image.Resampling.BOX).split()
    assert red.getpixel((1, 1)) > blue.getpixel((1, 1))                            # the middle ninth
    for corner in ((0, 0), (2, 0), (0, 2), (2, 2)):
        assert blue.getpixel(corner) > 1.5 * max(red.getpixel(corner), green.getpixel(corner))


def test_the_same_picture_comes_back_from_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("a large square", "--steps", "3", "--seed", "8", "-n", "2", "--scheduler", "euler_a", "-o",
        "pair.png")                                                              # of a colour for each seed
    run("--from", "pair-1.png", "-o", "alone.png", "-q")
    run("--from", "alone.png", "-o", "again.png", "-q")
    in_batch, alone, again = (np.asarray(Image.open(name)).astype(int)
                              for name in ("pair-1.png", "alone.png", "again.png"))
    assert (again == alone).all()
    assert abs(in_batch - alone).max() <= 2                                      # of 255: rounding in a batch
    assert abs(in_batch - np.asarray(Image.open("pair-0.png"))).mean() > 2       # another seed
