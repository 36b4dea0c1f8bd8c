"""Checkpoints that are pickles (`.ckpt`, `.pt`, `.pth`, `.bin`), read as data: no code of a file ever runs.

A pickle is a program for a small stack machine: push a number, make a list, call this function. Python's own
machine calls whatever the file names, so that opening a checkpoint can do anything. The one below executes
the same instructions, but a name in the file stays a name, and of all calls it carries out those in CALLS,
which make tensors and dictionaries. What any other call would have given is a `Stub`. So a checkpoint that
holds a training callback or an optimiser loads too, and nobody has to trust it.

Around the pickle, PyTorch has had two formats:

    since 1.6   a zip archive: NAME/data.pkl, and NAME/data/KEY with the bytes of each storage, which are not
                compressed, so that they can be mapped into memory
    before      five pickles in a row (a magic number, a version, facts about the machine, the objects, the
                keys of the storages), then for each key a count and the bytes
"""
import io
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

MAGIC = 0x1950A86A20F9469CFC6C      # the first pickle of the old format

# FloatStorage and so on, by what they hold. Types that came later have no class: they are stored as bytes.
STORAGES = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
            "BFloat16": torch.bfloat16, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
            "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8,
            "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8, "_Untyped": torch.uint8}


class Global(NamedTuple):
    """The name of a class or function in a file."""
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Stub(dict):
    """In place of an object that is not ours to make: what was to make it, and the items put into it."""
    __hash__ = object.__hash__      # type: ignore[assignment]      # the object may be a key of a dictionary

    def __init__(self, maker: Any):
        super().__init__()
        self.maker = maker


class Storage(NamedTuple):
    """What tensors are views of: bytes, 1-D, and the numbers that they are."""
    data: Tensor
    dtype: torch.dtype


def read_pickle(file: Path) -> Any:
    """What is in a checkpoint: dictionaries, lists, tensors, numbers, texts; and `Stub`s and `Global`s.

    The tensors are on the CPU. Those of a zip archive are mapped into memory: bytes are read when they are
    used, and writing to a tensor leaves the file alone. Parameters are plain tensors here, and an
    `OrderedDict` is a plain dictionary.

    ValueError: the file is damaged, or in neither of the two formats.
    """
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
        stream.seek(0)
        try:
            return _read_zip(stream) if zipped else _read_old(stream)
        except _Refused as error:
            raise ValueError(f"{file} {error}") from None
        except Exception as error:              # a hostile file decides which one is raised
            raise ValueError(damaged(file, error)) from error


def damaged(file: Path, error: Exception) -> str:
    """What to say of a file that cannot be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    size   = file.stat().st_size
    with file.open("rb") as stream:
        pickled = file.suffix == ".safetensors" and stream.read(2) in (b"PK", b"\x80\x02")
    remedy = "it looks like a pickle, so name it .ckpt" if pickled else "download it again"
    return f"{file} ({size:,} bytes) is truncated or not what it should be ({reason}): {remedy}"


class _Refused(Exception):
    """The file may be whole, but is not for us; says why."""


def _read_zip(stream: IO[bytes]) -> Any:
    mapping = mmap(stream.fileno(), 0, access=ACCESS_COPY)
    archive = zipfile.ZipFile(stream)
    names   = set(archive.namelist())
    main    = min((name for name in names if name.endswith("/data.pkl")), key=len, default="data.pkl")
    folder  = main.removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names:
        raise _Refused("is a TorchScript program, and ldm runs none: use a checkpoint or safetensors")
    for name in {main, f"{folder}byteorder"} & names:
        _refuse_compressed(archive.getinfo(name))           # a few bytes could become any number of them
    if f"{folder}byteorder" in names:
        _check_byte_order(archive.read(f"{folder}byteorder").decode())
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        if key not in storages:
            entry = archive.getinfo(f"{folder}data/{key}")
            storages[key] = _mapped(stream, mapping, entry, count * dtype.itemsize)
        return Storage(storages[key], dtype)
    return _run(io.BytesIO(archive.read(main)), storage)


def _refuse_compressed(entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise _Refused("was compressed after PyTorch had written it: pack it again without compression")


def _mapped(stream: IO[bytes], mapping: mmap, entry: zipfile.ZipInfo, size: int) -> Tensor:
    """The first bytes of an entry of the archive, where they lie in the file."""
    _refuse_compressed(entry)
    if size > entry.file_size:
        raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes instead of {size:,}")
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    stream.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))          # the lengths of what stands before the bytes
    start = entry.header_offset + 30 + name + extra
    return torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=start)


def _read_old(stream: IO[bytes]) -> Any:
    if _run(stream) != MAGIC:
        raise ValueError("no magic number of PyTorch")
    _run(stream)
    _check_byte_order("little" if _run(stream)["little_endian"] else "big")
    length = os.fstat(stream.fileno()).st_size
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int, view: Any = None) -> Storage:
        size = count * dtype.itemsize
        if size > length or view is not None:
            raise ValueError("larger than the file" if view is None else "from before PyTorch 0.4")
        if key not in storages:                                 # made here, filled below
            storages[key] = torch.empty(size, dtype=torch.uint8)
        return Storage(storages[key], dtype)

    content = _run(stream, storage)
    for key in _run(stream):
        stream.read(8)                                          # the count, once more
        space: Any = storages[_key(key)].numpy()
        if stream.readinto(space) < len(space):                 # type: ignore[attr-defined]
            raise ValueError("it ends too early")
    return content


def _check_byte_order(order: str) -> None:
    if order != sys.byteorder:
        raise _Refused(f"holds numbers in {order}-endian order: save it again on a machine like this one")


def _run(stream: IO[bytes], storage: Callable[..., Storage] | None = None) -> Any:
    """Executes the pickle at the stream's position, as data; returns what it leaves on the stack.

    storage: (dtype, key, count) → what PyTorch keeps outside of the pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = object()

    def pop(count: int) -> list[Any]:
        if count > len(stack):
            raise IndexError("an instruction without its arguments")
        top = stack[len(stack) - count:]
        del stack[len(stack) - count:]
        return top

    def items() -> list[Any]:
        """What was pushed since the last mark."""
        top = pop(next((i for i, value in enumerate(reversed(stack)) if value is mark), len(stack)))
        pop(1)
        return top

    def put(kind: type, add: Callable[[Any, Any], None], new: Any) -> None:
        """Into the container on top. A stub is a dictionary; what it is given otherwise is left out."""
        if isinstance(stack[-1], kind):
            add(stack[-1], new)
        elif not isinstance(stack[-1], Stub):
            raise TypeError(f"a {type(stack[-1]).__name__} where a {kind.__name__} must be")

    def outside(reference: Any) -> Any:
        if not (isinstance(reference, tuple) and reference[:1] == ("storage",) and storage):
            return Stub(_key(reference))
        _, kind, key, _, count, *view = reference               # the fourth is a device
        return storage(STORAGES[kind.name.removesuffix("Storage")], _key(key), count, *view)

    act: dict[str, Callable[[Any], Any]] = {                    # instruction → what it does with its argument
        "PROTO":        lambda _: None,
        "FRAME":        lambda _: None,
        "STOP":         lambda _: None,
        "MARK":         lambda _: stack.append(mark),
        "POP":          lambda _: pop(1),
        "POP_MARK":     lambda _: items(),
        "PUT":          lambda i: memo.update({i: stack[-1]}),
        "MEMOIZE":      lambda _: memo.update({len(memo): stack[-1]}),
        "APPEND":       lambda _: put(list, list.extend, pop(1)),
        "APPENDS":      lambda _: put(list, list.extend, items()),
        "ADDITEMS":     lambda _: put(set, set.update, map(_key, items())),
        "SETITEM":      lambda _: put(dict, dict.update, _pairs(pop(2))),
        "SETITEMS":     lambda _: put(dict, dict.update, _pairs(items())),
        "BUILD":        lambda _: pop(1),                       # the attributes of an object: ours have none
    }
    push: dict[str, Callable[[Any], Any]] = {                   # instruction → what it pushes
        "NONE":         lambda _: None,
        "NEWTRUE":      lambda _: True,
        "NEWFALSE":     lambda _: False,
        "EMPTY_TUPLE":  lambda _: (),
        "EMPTY_LIST":   lambda _: [],
        "EMPTY_DICT":   lambda _: {},
        "EMPTY_SET":    lambda _: set(),
        "TUPLE1":       lambda _: tuple(pop(1)),
        "TUPLE2":       lambda _: tuple(pop(2)),
        "TUPLE3":       lambda _: tuple(pop(3)),
        "TUPLE":        lambda _: tuple(items()),
        "LIST":         lambda _: items(),
        "DICT":         lambda _: _pairs(items()),
        "FROZENSET":    lambda _: frozenset(map(_key, items())),
        "DUP":          lambda _: stack[-1],
        "GET":          lambda i: memo[i],
        "GLOBAL":       lambda words: Global(*words.split(" ", 1)),
        "STACK_GLOBAL": lambda _: Global(*map(_key, pop(2))),
        "REDUCE":       lambda _: _call(*pop(2)),
        "NEWOBJ":       lambda _: _call(*pop(2)),
        "NEWOBJ_EX":    lambda _: _call(*pop(3)[:2]),
        "INST":         lambda words: _call(Global(*words.split(" ", 1)), items()),
        "OBJ":          lambda _: _call((top := items())[0], top[1:]),
        "PERSID":       outside,
        "BINPERSID":    lambda _: outside(*pop(1)),
    }
    for kind in ("BIN", "LONG_BIN"):                            # the same with shorter arguments
        act[f"{kind}PUT"], push[f"{kind}GET"] = act["PUT"], push["GET"]

    # genops is the standard library's parser of instructions; it executes nothing.
    for instruction, argument, _ in pickletools.genops(stream):
        name = instruction.name
        if name in act:
            act[name](argument)
        elif name in push:
            stack.append(push[name](argument))
        elif name.startswith("EXT") or argument is None:        # a number for a function; a buffer
            raise _Refused(f"uses the pickle instruction {name}, which no checkpoint needs")
        else:
            stack.append(argument)                              # a number, a text, bytes
    return stack[-1]


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_key, items[::2]), items[1::2], strict=True))


def _key(value: Any) -> Any:
    """A value that may be looked up and shown. TypeError: a tuple of too many parts. For a tuple can hold
    another one twice, and so on, forty times in a hundred bytes: then its hash takes years."""
    parts, count = [value], 0
    while parts:
        count += 1
        if isinstance(part := parts.pop(), tuple | frozenset):
            parts += part
        if count + len(parts) > 1000:
            raise TypeError("a key of more than a thousand parts")
    return value


def _call(maker: Any, arguments: Any) -> Any:
    return CALLS[maker](*arguments) if isinstance(maker, Global) and maker in CALLS else Stub(_key(maker))


def _tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage; `as_strided` raises if it would leave its bounds. The rest is about gradients."""
    return storage.data.view(storage.dtype).as_strided(size, stride, offset)


def _tensor_of_bytes(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
                     requires_grad: bool, hooks: Any, dtype: Global, *_: Any) -> Tensor:
    """The same for types without a storage of their own, such as float8."""
    found = vars(torch)[dtype.name]
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{dtype} is no type of numbers")
    return _tensor(Storage(storage.data, found), offset, size, stride)


# All that can be called: name → (arguments) → value.
CALLS: dict[Global, Callable[..., Any]] = {
    Global("torch._utils", "_rebuild_tensor"):               _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"):            _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"):            _tensor_of_bytes,
    Global("torch._utils", "_rebuild_parameter"):            lambda tensor, *_: tensor,
    Global("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    Global("torch._tensor", "_rebuild_from_type_v2"):        lambda maker, _, args, *__: _call(maker, args),
    Global("torch", "Size"):                                 tuple,
    Global("collections", "OrderedDict"):                    lambda pairs=(): {_key(k): v for k, v in pairs},
}
