"""Reading checkpoint files: JSON, the choice of the weight files in a folder, the tensors in them.

A component (`unet/`, `vae/`, `text_encoder/` …) keeps its tensors in one file, or in several *shards* with an
index that says which tensor is in which. A *variant* is a second set beside the first, `fp16` or `non_ema`.
Its name stands before the last extension; shards and their index have a new spelling and an old one:

                 plain                               variant fp16
    one file     model.safetensors                   model.fp16.safetensors
    index        model.safetensors.index.json        model.safetensors.index.fp16.json            (new)
                                                     model.safetensors.fp16.index.json            (old)
    shard        model-00001-of-00002.safetensors    model.fp16-00001-of-00002.safetensors        (new)
                                                     model-00001-of-00002.fp16.safetensors        (old)
"""
import json
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .pickles import Global, Stub, damaged, read_pickle

# How the names begin: diffusers' (U-Net, VAE), then transformers' (text encoder). Safetensors come first.
STEMS  = {"safetensors": ("diffusion_pytorch_model", "model"),
          "bin":         ("diffusion_pytorch_model", "pytorch_model")}
NUMBER = r"-\d+-of-\d+"


class Weights(NamedTuple):
    """One set of weights among the files of a folder."""
    main: str               # the weight file, or the index of the shards
    shards: list[str]       # the shards beside an index
    variant: str | None


def choose(names: Collection[str], variant: str | None) -> Weights | None:
    """The weights to read among these files: the variant before the plain set, safetensors before `.bin`."""
    for v in dict.fromkeys((variant, None)):
        dot = f".{v}" if v else ""
        for end, stems in STEMS.items():
            for stem in stems:
                single  = f"{stem}{dot}.{end}"
                indices = f"{stem}.{end}.index{dot}.json", f"{stem}.{end}{dot}.index.json"
                shard   = re.compile(rf"{stem}({re.escape(dot)}{NUMBER}|{NUMBER}{re.escape(dot)})\.{end}")
                if single in names:
                    return Weights(single, [], v)
                for index in indices:
                    if index in names:
                        return Weights(index, sorted(filter(shard.fullmatch, names)), v)
    return None


def variants(names: Collection[str]) -> set[str]:
    """The variants of which a folder with these files has weights: {"fp16", "non_ema"}, say."""
    stems   = "|".join(stem for stems in STEMS.values() for stem in stems)
    pattern = re.compile(rf"({stems})({NUMBER})?\.(?P<variant>[^.]+?)({NUMBER})?\.({'|'.join(STEMS)})")
    return {match["variant"] for match in map(pattern.fullmatch, names) if match}


def of_variants(names: Collection[str]) -> str:
    """For messages about files without plain weights: how to read those of variants, if there are some."""
    found = sorted(v for v in variants(names) if (there := choose(names, v)) and there.variant == v)
    return f" There are those of {', '.join(found)}: give variant={found[0]!r}." if found else ""


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files with the tensors of the component in `folder`: one, or all shards of an index.

    A component without the wanted variant gives its plain weights and a warning. FileNotFoundError: no
    weights, or missing shards. ValueError: an index that is damaged or points out of the folder.
    """
    weights = choose(file_names(folder), variant)
    if weights is None:
        wish = f" of variant {variant!r} or plain" if variant else ""
        raise FileNotFoundError(f"{folder} has no weights{wish} (safetensors or .bin)."
                                f"{of_variants(file_names(folder))} {_listing(folder)}")
    if weights.variant != variant:
        warnings.warn(f"{folder.name} has no {variant!r} weights: {weights.main} is read", stacklevel=2)
    file = folder / weights.main
    return shards(file) if file.suffix == ".json" else [file]


def shards(index: Path) -> list[Path]:
    """The files that an index names. FileNotFoundError: some are missing. ValueError: no index, or a trap."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or {*map(type, weight_map.values())} != {str}:
        raise ValueError(f'{index} is not an index of weights: it has no "weight_map" from tensors to files')
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if re.search(r"[/\\]", name) or name in ("", ".", "..")]:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file beside it: refused. Download it "
                         "again, from a source you trust")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, named in {index.name} "
                                f"({len(names)} shards in all): download the folder again")
    return [index.parent / name for name in names]


def read_weights(folder: Path, variant: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of the component in `folder`, and where they lie, in words. As the two functions used."""
    files = weight_files(folder, variant)
    where = str(files[0]) if len(files) == 1 else f"{folder} ({len(files)} shards)"
    return read_tensors(files), where


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of the files by name, on the CPU, mapped into memory: bytes are read when they are used.

    `.bin` files from before PyTorch 1.6 cannot be mapped and are read whole.
    ValueError: a truncated file, a Git LFS pointer, a file of something else.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        refuse_lfs_pointer(file)
        state |= _read_safetensors(file) if _is_safetensors(file) else _read_pickle(file)
    return state


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """All tensors of a single file, `.safetensors` or a pickle (`.ckpt`, `.pt` …), as `read_tensors`.

    Training frameworks keep the weights in a `state_dict`, beside steps and callbacks: these are left out.
    """
    if _is_safetensors(file):
        return read_tensors([file])
    refuse_lfs_pointer(file)
    value = read_pickle(file)
    for _ in range(4):                              # not forever: a hostile file may be its own state_dict
        value = value.get("state_dict", value) if isinstance(value, dict) else {}
    tensors = {name: tensor for name, tensor in value.items()
               if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no dictionary of tensors, so it is not a checkpoint")
    return tensors


def metadata(file: Path) -> dict[str, str]:
    """What is written into the header of a `.safetensors` file; nothing for other files."""
    from safetensors import safe_open

    if not _is_safetensors(file):
        return {}
    with safe_open(file, framework="pt") as tensors:
        return tensors.metadata() or {}


def _is_safetensors(file: Path) -> bool:
    """By the name, or by the bytes: a JSON object behind its length."""
    with file.open("rb") as stream:
        return file.suffix == ".safetensors" or stream.read(9)[8:] == b"{"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}      # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(damaged(file, error)) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    state  = read_pickle(file)
    others = {"all of it": state}
    if isinstance(state, dict) and state:
        others = {repr(name): value for name, value in state.items() if not isinstance(value, Tensor)}
    for name, value in others.items():
        made = isinstance(value, Stub) and isinstance(value.maker, Global)
        kind = value.maker if made else f"a {type(value).__name__}"
        raise ValueError(f"{file} does not hold a dictionary of tensors, so not the weights of a component: "
                         f"{name} is {kind}")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. FileNotFoundError, or ValueError if the file is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {_listing(path.parent)}")
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(damaged(path, error)) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object {{…}}, but holds a {type(value).__name__}")
    return value


def file_names(folder: Path) -> set[str]:
    """The names of the files in a folder (a link to nowhere is none); empty if there is no such folder."""
    return {path.name for path in folder.glob("*") if path.is_file()}


def refuse_lfs_pointer(file: Path) -> None:
    """ValueError: git-lfs left a note where the file should be."""
    with file.open("rb") as stream:
        if stream.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{file} is not the file itself but a Git LFS pointer of {file.stat().st_size} "
                             "bytes: run `git lfs pull` in its repository, or download the file again")


def _listing(folder: Path) -> str:
    """What is in a folder, for error messages."""
    if not folder.is_dir():
        return f"There is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir())
    return f"In the folder: {', '.join(names[:12]) or 'nothing'}{' …' if len(names) > 12 else ''}"
