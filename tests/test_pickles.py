"""ldm/weights/pickles.py: what PyTorch saved comes back, and what a hostile file asks for does not happen."""
import argparse
import copyreg
import functools
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.weights.pickles import MAGIC, Global, Stub, read_pickle
from ldm.weights.read import read_checkpoint, read_tensors

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def write(file: Path, program: bytes, zipped: bool = True) -> Path:
    """A checkpoint with this pickle in it, and a storage "0" of eight bytes."""
    if zipped:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", program)
            archive.writestr("x/data/0", bytes(range(8)))
    else:
        facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        file.write_bytes(b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, facts)) + program
                         + (pickle.dumps(["0"], 2) + (8).to_bytes(8, "little") + bytes(range(8))
                            if b"storage" in program else pickle.dumps([], 2)))
    return file


def tensor_program(size: str, stride: str, offset: int = 0, count: int = 8) -> bytes:
    """The text of a pickle that makes a tensor of bytes from the storage "0"."""
    return (f"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nByteStorage\nS'0'\nS'cpu'\nI{count}\n"
            f"tQI{offset}\n{size}{stride}I00\nNtR.").encode()


# -- what is meant to be read --------------------------------------------------------------------------------
def everything(zipped):
    base = torch.arange(24.0).reshape(4, 6)
    tagged = torch.ones(2)
    tagged.note = "makes PyTorch save it by its class"
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
             torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]
    newer = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]   # PyTorch cannot read them from old files
    return OrderedDict({
        "base": base, "transposed": base.T, "part": base[1:3, ::2], "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4), "expanded": torch.ones(1).expand(5), "tagged": tagged,
        "parameter": torch.nn.Parameter(torch.ones(3)), "gradient": torch.ones(2, requires_grad=True),
        **{str(dtype): torch.tensor([1, 0, 1]).to(dtype) for dtype in types + newer * zipped},
    })


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_as_torch_reads_them(tmp_path, zipped, protocol):
    file, tensors = tmp_path / "a.ckpt", everything(zipped)
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    theirs, ours = torch.load(file, weights_only=False), read_pickle(file)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].stride()) == (tensor.dtype, tensor.stride()), name
        assert torch.equal(ours[name], tensor.detach()), name
        assert not ours[name].requires_grad
    ours["base"].zero_()                                                # one storage under these three
    assert ours["transposed"].abs().max() == ours["part"].abs().max() == 0


@FORMATS
def test_all_that_a_training_framework_keeps_beside_the_weights(tmp_path, zipped):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    content = {
        "state_dict": torch.nn.Linear(2, 3).state_dict(), "global_step": 840000, "version": "1.4.2",
        "callbacks": {argparse.Namespace: {"best": np.float64(0.5), "path": "a/b", "kind": np.dtype("f4")}},
        "lr": 1e-4, "optimizer_states": [optimizer.state_dict()], "hparams": argparse.Namespace(),
        "loops": (True, False, {1, 2}, frozenset({3}), b"bytes", 1 << 80, -5, torch.Size([2, 3])),
        "none": None, "array": np.arange(3), "device": torch.device("cpu"), "dtype": torch.float16,
    }
    file = tmp_path / "a.ckpt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    ours = read_pickle(file)
    assert list(ours) == list(content)
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in content["state_dict"].items())
    for name in ("global_step", "version", "lr", "none", "optimizer_states"):
        assert ours[name] == content[name]
    assert [ours["loops"][i] for i in (0, 1, 5, 6, 7)] == [True, False, 1 << 80, -5, (2, 3)]
    assert list(ours["callbacks"]) == [Global("argparse", "Namespace")]
    assert ours["dtype"] == Global("torch", "float16")
    assert isinstance(ours["array"], Stub)
    assert isinstance(ours["hparams"], Stub)


@pytest.mark.parametrize("protocol", range(6))
def test_every_instruction_that_python_writes(tmp_path, protocol):
    shared  = ["twice"]
    content = {"text": "µ" * 300, "short": "a", "long": -(1 << 2100), "ints": [0, 255, 65535, -1, 1 << 31],
               "float": -1.5, "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "flags": [True, False],
               "nothing": None, "shared": [shared, shared], "many": list(range(2000)),
               "map": {i: str(i) for i in range(300)}}
    if protocol > 3:
        content |= {"set": {1, 2}, "frozen": frozenset({3, 4}), "bytes": b"abc" * 100}
    ours = read_pickle(write(tmp_path / "a.ckpt", pickle.dumps(content, protocol)))
    assert ours == content
    assert ours["shared"][0] is ours["shared"][1]


def test_a_dictionary_of_another_class_keeps_its_items(tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save(defaultdict(list, {"a": torch.ones(2)}), file)
    assert torch.equal(read_tensors([file])["a"], torch.ones(2))


# -- what is not ---------------------------------------------------------------------------------------------
class Call:
    """Unpickling it calls a function."""
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def attacks(path: str) -> dict[str, bytes]:
    """Pickles, each of which makes a folder when Python reads it."""
    where = f"S'{path}'\n".encode()
    short = b"\x8c" + bytes([len(path)]) + path.encode()                                  # SHORT_BINUNICODE
    lazy  = b"cbuiltins\nmap\ncos\nmkdir\n(" + where + b"l\x86\x81"
    return {
        "os.system":     pickle.dumps(Call(os.system, f"mkdir {path}")),
        "builtins.eval": pickle.dumps({"state_dict": Call(eval, f"__import__('os').mkdir({path!r})")}, 2),
        "getattr":       b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'mkdir'\ntR("
                         + where + b"tR.",
        "nested":        pickle.dumps([Call(functools.partial(os.mkdir, path))], 2),
        "in tensor":     b"ctorch._utils\n_rebuild_parameter\n(cos\nmkdir\n(" + where + b"tRI00\nNtR.",
        "as a key":      b"(cos\nmkdir\n(" + where + b"tRI1\nd.",
        "dotted name":   b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + short + b"\x85R.",          # STACK_GLOBAL
        "INST":          b"(" + where + b"ios\nmkdir\n.",
        "OBJ":           b"(cos\nmkdir\n" + where + b"o.",
        # map calls nothing until tuple.__new__ reads it
        "NEWOBJ":        b"cbuiltins\ntuple\n" + lazy + b"\x85\x81.",
        "NEWOBJ_EX":     b"cbuiltins\ntuple\n" + lazy + b"\x85}\x92.",
        # BUILD gives an object a method, which the next instruction calls.
        "BUILD":         b"cargparse\nNamespace\n)\x81}S'__setstate__'\ncos\nmkdir\nsb" + where + b"b.",
        "APPEND":        b"cargparse\nNamespace\n)\x81}S'append'\ncos\nmkdir\nsb" + where + b"a.",
        "memo":          b"cos\nmkdir\nq\x00(" + where + b"tq\x010h\x00h\x01R.",
        "EXT1":          b"\x80\x02\x82\xf0(" + where + b"tR.",
        "EXT4":          b"\x80\x02\x84\xf0\x00\x00\x00(" + where + b"tR.",
    }


@FORMATS
@pytest.mark.parametrize("name", attacks("x"))
def test_nothing_that_a_file_names_runs(tmp_path, name, zipped):
    trapped = tmp_path / "trapped"
    program = attacks(str(trapped))[name]
    copyreg.add_extension("os", "mkdir", 0xF0)
    try:
        pickle.loads(program)                                           # Python's own machine falls for it
        assert trapped.is_dir()
        trapped.rmdir()
        file = write(tmp_path / "a.ckpt", program, zipped)
        if name.startswith("EXT"):
            with pytest.raises(ValueError, match=rf"a\.ckpt uses the pickle instruction {name}, which no"):
                read_pickle(file)
        else:
            read_pickle(file)
        with pytest.raises(ValueError, match=r"a\.ckpt"):
            read_tensors([file])                                        # nor is it taken for weights
        assert not trapped.exists()
    finally:
        copyreg.remove_extension("os", "mkdir", 0xF0)


def test_the_weights_beside_a_trap_are_read(tmp_path):
    file, trapped = tmp_path / "a.ckpt", tmp_path / "trapped"
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {Call: Call(os.mkdir, str(trapped))}}, file)
    content = read_pickle(file)
    assert torch.equal(content["state_dict"]["a"], torch.ones(2))
    (_, stub), = content["callbacks"].items()
    assert str(stub.maker) in ("posix.mkdir", "nt.mkdir")
    assert not trapped.exists()


@FORMATS
@pytest.mark.parametrize("program", [
    tensor_program("(I9\nt", "(I1\nt"),                                 # one more than there is
    tensor_program("(I2\nt", "(I7\nt", 1),
    tensor_program("(I8\nt", "(I1\nt", -1),
    tensor_program("(I8\nt", "(I1\nt", 1 << 62),
    tensor_program("(I8\nt", "(I-1\nt"),
    tensor_program("(I-8\nt", "(I1\nt"),
    tensor_program(f"(I{1 << 62}\nt", "(I1\nt"),
    tensor_program("(I8\nt", "(I1\nt", count=1 << 40),                  # a storage larger than the file
    tensor_program("(I8\nt", "(I1\nt", count=-1)[:-1] + b"0.",
    tensor_program("N", "N"),
    tensor_program("(I8\nt", "(I1\nt").replace(b"Byte", b"Bite"),
    tensor_program("(I8\nt", "(I1\nt").replace(b"S'0'", b"S'../data.pkl'"),
    tensor_program("(I8\nt", "(I1\nt").replace(b"ByteStorage", b"DoubleStorage"),
    b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI2\nI3\nI4\ntR.",         # no storage at all
    tensor_program("(I8\nt", "(I1\nt")[:-1] + b"I0\nI1\ns.",            # writes into a tensor
    b".", b"0.", b"R.", b"t.", b"(t0s.", b"g7\n.", b"I1\nI2\na.", b"I1\nq\x00", b"]I1\n\x90.", b"(I1\nd.",
    b"\x80\x05\x97.", b"S'", b"\xff.", b"(((((", b"}]I1\ns.", b"P\n",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",                        # a text of 2⁶³ letters
    b"(" * 100_000 + b"t" * 100_000 + b"R.",
])
def test_nonsense_is_refused_with_a_sentence(tmp_path, program, zipped):
    with pytest.raises(ValueError, match=r"a\.ckpt (\([\d,]+ bytes\) is truncated or|uses the pickle)"):
        read_pickle(write(tmp_path / "a.ckpt", program, zipped))


DEEP = b")" + b"2\x86" * 40                     # a tuple of 2⁴⁰ parts: each level has the one below twice


@FORMATS
@pytest.mark.parametrize("program", [
    b"}" + DEEP + b"I1\ns.", b"(" + DEEP + b"I1\nd.", b"\x8f(" + DEEP + b"\x90.", b"(" + DEEP + b"\x91.",
    b"S'os'\n" + DEEP + b"\x93.", DEEP + b")R.", DEEP + b"Q.",
    b"ccollections\nOrderedDict\n(]((" + DEEP + b"I1\ntetR.",
    tensor_program("(I8\nt", "(I1\nt").replace(b"S'0'\n", DEEP),
])
def test_what_would_take_years_to_look_up_is_refused(tmp_path, program, zipped):
    with pytest.raises(ValueError, match=r"more than a thousand parts"):
        read_pickle(write(tmp_path / "a.ckpt", program, zipped))


def test_a_persistent_id_that_is_no_storage(tmp_path):
    """Old files keep the source code of modules like this. It is text to us."""
    for program in (b"Panything\n.", b"(S'module'\nctorch.nn\nLinear\nS'a.py'\nS'print()'\ntQ."):
        assert isinstance(read_pickle(write(tmp_path / "a.ckpt", program)), Stub)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    file = tmp_path / "a.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    with pytest.raises(ValueError, match=r"a\.pt is a TorchScript program, and ldm runs none"):
        read_pickle(file)


def test_a_checkpoint_that_is_its_own_state_dict(tmp_path):
    file, content = tmp_path / "a.ckpt", {"epoch": 3}
    content["state_dict"] = {"state_dict": content}
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"a\.ckpt holds no dictionary of tensors"):
        read_checkpoint(file)


def test_a_whole_module_is_no_state_dict(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match=r"all of it is torch\.nn\.modules\.linear\.Linear"):
        read_tensors([file])


def test_what_is_no_state_dict_is_not_shown_in_full(tmp_path):
    """What was to make an object may be lists in lists, each twice: not to be printed."""
    deep = b"]" + b"".join(b"q%c](h%ch%ce" % (level, level, level) for level in range(40))
    with pytest.raises(ValueError, match="all of it is a Stub"):
        read_tensors([write(tmp_path / "pytorch_model.bin", deep + b")R.", True)])


@FORMATS
def test_the_other_byte_order_is_refused(tmp_path, zipped):
    file = tmp_path / "a.ckpt"
    if zipped:
        torch.save({"a": torch.ones(2)}, file)
        data = file.read_bytes()
        assert data.count(b"little") == 1
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new:
            for name in old.namelist():
                new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
        file = tmp_path / "b.ckpt"
    else:
        file.write_bytes(b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": False})))
    with pytest.raises(ValueError, match="ckpt holds numbers in big-endian order"):
        read_pickle(file)


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.ones(99)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, \
         zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"b\.ckpt was compressed after PyTorch had written it"):
        read_pickle(tmp_path / "b.ckpt")
    for part in ("data.pkl", "byteorder"):              # small in the file, and of any size in memory
        with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "c.ckpt", "w") as new:
            for name in old.namelist():
                kind = zipfile.ZIP_DEFLATED if name.endswith(part) else zipfile.ZIP_STORED
                new.writestr(name, old.read(name), kind)
        with pytest.raises(ValueError, match=r"c\.ckpt was compressed after PyTorch had written it"):
            read_pickle(tmp_path / "c.ckpt")


def test_truncated_and_other_files(tmp_path):
    torch.save({"a": torch.ones(999)}, tmp_path / "zip")
    torch.save({"a": torch.ones(999)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    file = tmp_path / "a.ckpt"
    for whole in ((tmp_path / "zip").read_bytes(), (tmp_path / "old").read_bytes()):
        for size in (0, 1, 2, 40, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=rf"a\.ckpt \({size:,} bytes\) is truncated .* it again"):
                read_pickle(file)
    for other in (b"PK\x03\x04 and nothing", b"version https://git-lfs.github.com/spec/v1\n", b"<html>"):
        file.write_bytes(other)
        with pytest.raises(ValueError, match="is truncated or not what it should be"):
            read_pickle(file)
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "nowhere.ckpt")
