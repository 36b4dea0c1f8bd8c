"""ldm/weights/read.py: which files of a folder are read, and what damaged ones lead to."""
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.weights.read import Weights, choose, read_checkpoint, read_json, read_tensors, variants, weight_files

POINTER = (b"version https://git-lfs.github.com/spec/v1\n"
           b"oid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n")
TENSORS = {"a": torch.arange(300_000, dtype=torch.float32).reshape(300, 1000),
           "b": torch.ones(3, dtype=torch.float16)}


def write_shards(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                 index="model.safetensors.index.json"):
    """The two TENSORS in two shards with an index."""
    folder.mkdir(exist_ok=True)
    for name, key in zip(names, TENSORS, strict=True):
        save_file({key: TENSORS[key]}, folder / name)
    weight_map = dict(zip(TENSORS, names, strict=True))
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# -- the choice of files -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("names", "variant", "expected"), [
    ("diffusion_pytorch_model.safetensors diffusion_pytorch_model.bin",
     None, "diffusion_pytorch_model.safetensors"),
    ("model.safetensors pytorch_model.bin",                             None, "model.safetensors"),
    ("pytorch_model.bin model.fp16.safetensors",                        None, "pytorch_model.bin"),
    ("model.safetensors model.fp16.safetensors",                      "fp16", "model.fp16.safetensors"),
    ("model.safetensors pytorch_model.fp16.bin",                      "fp16", "pytorch_model.fp16.bin"),
    ("pytorch_model.bin pytorch_model.non_ema.bin",                "non_ema", "pytorch_model.non_ema.bin"),
    ("pytorch_model.bin model.non_ema.safetensors",                     None, "pytorch_model.bin"),
    ("model.safetensors",                                             "fp16", "model.safetensors"),
])
def test_choose_one_file(names, variant, expected):
    chosen = choose(names.split(), variant)
    assert (chosen.main, chosen.shards) == (expected, [])
    assert chosen.variant == (variant if variant and f".{variant}." in expected else None)


@pytest.mark.parametrize("end", ["safetensors", "bin"])
@pytest.mark.parametrize(("variant", "index", "shard"), [
    (None,   "diffusion_pytorch_model.{}.index.json",      "diffusion_pytorch_model-0000{}-of-00002.{}"),
    ("fp16", "diffusion_pytorch_model.{}.index.fp16.json", "diffusion_pytorch_model.fp16-0000{}-of-00002.{}"),
    ("fp16", "diffusion_pytorch_model.{}.fp16.index.json", "diffusion_pytorch_model-0000{}-of-00002.fp16.{}"),
])
def test_choose_an_index_and_its_shards_in_every_spelling(variant, index, shard, end):
    plain  = [f"diffusion_pytorch_model.{end}.index.json", f"diffusion_pytorch_model-00001-of-00001.{end}"]
    shards = [shard.format(i, end) for i in (1, 2)]
    others = plain if variant else []
    assert choose([*others, *reversed(shards), index.format(end), "config.json"], variant) == \
        Weights(index.format(end), shards, variant)


def test_choose_nothing_and_variants():
    names = ["config.json", "diffusion_flax_model.msgpack", "openvino_model.bin", "model.onnx",
             "model.fp16.json"]
    assert choose(names, None) is None
    assert variants(names) == set()
    assert variants(["model.fp16.safetensors", "diffusion_pytorch_model.non_ema.bin", "pytorch_model.bin",
                     "model.bf16-00001-of-00003.safetensors", "model-00001-of-00002.safetensors",
                     "diffusion_pytorch_model-00001-of-00002.old.bin"]) == {"fp16", "non_ema", "bf16", "old"}


def test_weight_files_falls_back_with_a_warning_that_names_the_component(tmp_path):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"text_encoder has no 'fp16' weights: model\.safetensors is read"):
        assert weight_files(folder, "fp16") == [folder / "model.safetensors"]
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_weight_files_without_weights_says_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.fp16.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError,
                       match=r"has no weights.*There are those of fp16: give variant='fp16'\. In the folder"):
        weight_files(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'ema' or plain"):
        weight_files(tmp_path, "ema")
    (tmp_path / "diffusion_pytorch_model.ema-00001-of-00002.bin").write_bytes(b"")      # without an index
    with pytest.raises(FileNotFoundError, match=r"those of fp16: give variant='fp16'\."):
        weight_files(tmp_path, "ema")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        weight_files(tmp_path / "unet")


def test_a_link_to_nowhere_is_no_file(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "deleted")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        weight_files(tmp_path)


# -- indices -------------------------------------------------------------------------------------------------
def test_shards_are_read_together(tmp_path):
    state = read_tensors(weight_files(write_shards(tmp_path)))
    assert state.keys() == TENSORS.keys()
    assert all(torch.equal(state[name], TENSORS[name]) for name in TENSORS)


def test_an_index_may_name_its_shards_as_it_likes(tmp_path):
    write_shards(tmp_path, names=("first.safetensors", "second.safetensors"))
    assert [path.name for path in weight_files(tmp_path)] == ["first.safetensors", "second.safetensors"]


@pytest.mark.parametrize("name", ["model.ckpt", "MODEL.SAFETENSORS", "a1b2c3"])
def test_safetensors_are_known_by_their_bytes_too(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    for state in (read_checkpoint(tmp_path / name), read_tensors([tmp_path / name])):
        assert all(torch.equal(state[key], TENSORS[key]) for key in TENSORS)


def test_json_without_end_or_bottom_is_damaged(tmp_path):
    for text in ('{"a": ', "[" * 200_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_json(tmp_path / "config.json")


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError,
                       match=r"lacks model-00002-of-00002\.safetensors, named in model\.safet"):
        weight_files(tmp_path)


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors",
                                   "..", "", "..\\model.safetensors"])
def test_an_index_that_points_out_of_the_folder_is_refused(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError,
                       match=f"names {re.escape(repr(shard))}, which is not a file beside it: refused"):
        weight_files(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]},
                                   {"weight_map": {"a": 1, "b": "c"}}])
def test_an_index_without_a_weight_map(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match='no "weight_map"'):
        weight_files(tmp_path)


# -- tensors -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_old_and_new(tmp_path, zipped):
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    state = read_tensors([file])
    assert all(torch.equal(state[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_are_mapped_and_private(tmp_path, name):
    """Reading 40 MB costs no memory before the tensors are used, and writing to a tensor
    leaves the file alone."""
    big  = {"big": torch.ones(10_000_000)}
    file = tmp_path / name
    save_file(big, file) if name.endswith("safetensors") else torch.save(big, file)

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    read_tensors([file])                                            # whatever is imported on first use
    before = resident()
    tensor = read_tensors([file])["big"]
    assert resident() - before < 10_000_000
    assert tensor.sum() == 10_000_000
    assert resident() - before > 30_000_000
    tensor.zero_()
    assert read_tensors([file])["big"].min() == 1


@pytest.mark.parametrize("keep", [0, 4, 60, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zipped", "old"])
def test_truncated_files(tmp_path, kind, keep):
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    if kind == "safetensors":
        save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file, _use_new_zipfile_serialization=kind == "zipped")
    data = file.read_bytes()
    size = keep if isinstance(keep, int) else int(keep * len(data))
    file.write_bytes(data[:size])
    with pytest.raises(ValueError,
                       match=rf"{file.name} \({size:,} bytes\) is truncated .*: download it again"):
        read_tensors([file])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_lfs_pointers_and_web_pages(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(POINTER)
    with pytest.raises(ValueError,
                       match=rf"{name} is not .* a Git LFS pointer of {len(POINTER)} bytes: run `git lfs"):
        read_tensors([file])
    file.write_bytes(b"<!DOCTYPE html><html><body>Entry not found</body></html>")
    with pytest.raises(ValueError, match="truncated or not what it should be"):
        read_tensors([file])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_the_name_of_another_format(tmp_path, zipped):
    file = tmp_path / "model.safetensors"
    torch.save({"x": torch.ones(1)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"it looks like a pickle, so name it \.ckpt$"):
        read_tensors([file])


class Trap:
    """Unpickling it would make a folder."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(tmp_path, zipped):
    file = tmp_path / "pytorch_model.bin"
    torch.save({**TENSORS, "x": Trap(str(tmp_path / "trapped"))}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"not hold a dictionary of tensors.*: 'x' is (posix|nt)\.mkdir"):
        read_tensors([file])
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {"a": torch.ones(2)}},
                                     {"a": torch.ones(2), "epoch": 3}])
def test_bin_files_that_are_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not hold a dictionary of tensors"):
        read_tensors([tmp_path / "pytorch_model.bin"])


# -- JSON ----------------------------------------------------------------------------------------------------
def test_read_json(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing\. In the folder: nothing"):
        read_json(file)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        read_json(tmp_path / "unet" / "config.json")
    file.write_text('{"sample_size": 64, "name": "µ"}', encoding="utf-8")
    assert read_json(file) == {"sample_size": 64, "name": "µ"}
    file.write_text('{"sample_size": 6')
    with pytest.raises(ValueError, match=r"config\.json \(17 bytes\) is truncated .*: download it again"):
        read_json(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="truncated or not what it should be"):
        read_json(file)
    file.write_bytes(POINTER)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        read_json(file)
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a list"):
        read_json(file)


# -- what diffusers writes -----------------------------------------------------------------------------------
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_files_written_by_diffusers(tmp_path, safe, variant, shard):
    import diffusers
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)
    vae.save_pretrained(tmp_path, safe_serialization=safe, variant=variant, max_shard_size=shard)
    files = weight_files(tmp_path, variant)
    assert (len(files) > 1) == (shard == "20KB")
    assert all(file.suffix == (".safetensors" if safe else ".bin") for file in files)
    state = read_tensors(files)
    assert state.keys() == vae.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in vae.state_dict().items())
    if safe and shard == "10GB":
        assert load_file(files[0]).keys() == state.keys()
