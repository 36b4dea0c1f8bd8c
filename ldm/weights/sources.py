"""The two ways a model is stored: a folder in Hugging Face layout, or a single checkpoint file in LDM names.

Both answer the same questions: `index` (model_index.json), `scheduler` (scheduler_config.json), `encoders`
(the names of the text encoders), `part(name)` (its config and tensors), `tokenizer(name)`. A file answers
from its tensors and the published configurations, see detect.py; it needs no network.
"""
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import detect
from .detect import Family
from .find import find, find_vae
from .load import Part, load_tokenizer, shown
from .names import State
from .read import metadata, read_checkpoint, read_json, read_weights
from .vocabulary import END, clip_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

ENCODERS = ("text_encoder", "text_encoder_2")


def open_source(name: str | Path, *, variant: str | None = None, revision: str | None = None,
                prediction: str | None = None, ema: bool = False) -> "Folder | File":
    """The folder or the file of a model. Arguments and errors are those of `ldm.load`."""
    path = Path(name).expanduser()
    if path.is_file():
        _only_for_folders(path, variant=variant, revision=revision)
        file = open_file(path, prediction=prediction, ema=ema)
        for part in file.needed:
            if part not in file.parts and part != "vae":                    # which may be another file
                remedy = "read it with ldm.load_vae" if [*file.parts] == ["vae"] else "use a complete file"
                raise ValueError(f"{path} looks like {file.kind}: it has no {part}, only "
                                 f"{', '.join(file.parts)}; {remedy}")
        if unknown := [name for name, what in file.others.items() if what == detect.UNKNOWN]:
            warnings.warn(f"{path.name} has {len(unknown)} tensors that belong to no part and are left out: "
                          f"{shown(unknown)}", stacklevel=3)
        return file
    if ema:
        raise ValueError("ema=True is for single files. In folders the plain weights are the averages, and "
                         "variant='non_ema' are the others, where they are kept")
    return Folder(find(name, variant=variant, revision=revision), variant, prediction)


@dataclass(frozen=True)
class Folder:
    """A pipeline in Hugging Face layout."""
    path: Path
    variant: str | None    = None
    prediction: str | None = None          # instead of what scheduler_config.json says

    @property
    def index(self) -> dict[str, Any]:
        return read_json(self.path / "model_index.json")

    @property
    def scheduler(self) -> dict[str, Any]:
        config = read_json(self.path / "scheduler" / "scheduler_config.json")
        return {**config, "prediction_type": self.prediction} if self.prediction else config

    @property
    def encoders(self) -> list[str]:
        index = self.index
        return [name for name in ENCODERS if index.get(name, [None, None]) != [None, None]]

    def part(self, name: str) -> Part:
        return read_part(self.path / name, self.variant)

    def tokenizer(self, encoder: str) -> "CLIPTokenizer":
        return load_tokenizer(self.path / encoder.replace("text_encoder", "tokenizer"))


@dataclass(frozen=True)
class File:
    """A single checkpoint file: a whole model, or a U-Net or an autoencoder alone."""
    path: Path
    kind: str                                           # in words
    state: State               = field(repr=False)      # all tensors
    parts: Mapping[str, State] = field(repr=False)
    others: Mapping[str, str]  = field(repr=False)      # names that belong to no part → what they are
    family: Family                                      # without a U-Net, a nameless one
    prediction: str | None                              # without a U-Net, None
    evidence: str                                       # of the prediction

    @property
    def index(self) -> dict[str, Any]:
        return self.family.index

    @property
    def scheduler(self) -> dict[str, Any]:
        zero: dict[str, Any] = {}
        if "ztsnr" in self.others:              # trailing spacing is the one that visits the pure noise
            zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {**self.family.scheduler, "prediction_type": self.prediction, **zero}

    @property
    def encoders(self) -> list[str]:
        return [name for name in ENCODERS if name in self.parts]

    @property
    def needed(self) -> list[str]:
        """The parts of a whole model."""
        two = "XL" in self.family.name and "refiner" not in self.family.name
        return ["unet", "vae", *ENCODERS[:1 + two]]

    def part(self, name: str) -> Part:
        if name not in self.parts:
            whole  = "unet" in self.parts
            remedy = "give one with vae=" if name == "vae" and whole else "use a complete file"
            raise ValueError(f"{self.path} looks like {self.kind}: it has no {name}, only "
                             f"{', '.join(self.parts)}; {remedy}")
        state  = self.parts[name]
        text   = partial(detect.text_config, xl="XL" in self.family.name)
        read   = {"unet": detect.unet_config, "vae": detect.vae_config}.get(name, text)
        config = _config(self.path, name, read, state)
        known: dict[str, dict[str, Any]] = {"unet": {"sample_size":    self.family.sample_size},
                                            "vae":  {"scaling_factor": self.family.scaling_factor}}
        return Part(f"{self.path} ({name})", {**known.get(name, {}), **config}, state)

    def tokenizer(self, encoder: str) -> "CLIPTokenizer":
        return clip_tokenizer("!" if detect.is_open_clip(self.parts[encoder]) else END)


def open_file(path: Path, *, prediction: str | None = None, ema: bool = False) -> File:
    """Reads a single file as far as telling what it is. ValueError: damaged, or nothing that ldm reads."""
    state = _both_halves(path, read_checkpoint(path))
    kind  = detect.kind(state)
    parts, others = detect.split(state)
    if not parts or not detect.readable(kind):
        raise ValueError(f"{path} looks like {kind}; ldm reads checkpoints of Stable Diffusion 1.x, 2.x and "
                         "XL, and their autoencoders")
    if "unet" not in parts:
        return File(path, kind, state, parts, others, Family("", {}), None, "")
    if ema:
        parts["unet"] = _averaged(path, state, parts["unet"])
    unet     = _config(path, "unet", detect.unet_config, parts["unet"])
    evidence = "as asked for"
    if prediction is None:
        prediction, evidence = detect.find_prediction(unet, parts["unet"], others, metadata(path), path.name)
    family   = detect.find_family(unet, prediction, path.name)
    return File(path, kind, state, parts, others, family, prediction, evidence)


def open_vae(name: str | Path, *, variant: str | None = None, revision: str | None = None,
             scaling_factor: float | None = None) -> Part:
    """The autoencoder of a name, with its config. Arguments and errors are those of `ldm.load_vae`."""
    path = Path(name).expanduser()
    if path.is_file():
        _only_for_folders(path, variant=variant, revision=revision)
        file  = open_file(path)
        part  = file.part("vae")
        known = "unet" in file.parts
    else:
        part  = read_part(find_vae(name, variant=variant, revision=revision), variant)
        known = part.config.get("scaling_factor") is not None
    if scaling_factor is None or known or part.config.get("_class_name") == "AutoencoderTiny":
        return part
    return part._replace(config={**part.config, "scaling_factor": scaling_factor})


def read_part(folder: Path, variant: str | None = None) -> Part:
    """A part in a folder of its own. Errors: as `read_json`, `weight_files` and `read_tensors`."""
    config = read_json(folder / "config.json")
    tensors, where = read_weights(folder, variant)
    return Part(where, config, tensors)


def _both_halves(path: Path, state: State) -> State:
    """TAESD comes as two files, *encoder* and *decoder*, with numbers for names: gives both, joined."""
    half = re.search("(en|de)coder", path.name)
    if half is None or not all(re.match(r"\d+\.", name) for name in state):
        return state
    files = {name: path.with_name(path.name.replace(half[0], name)) for name in ("encoder", "decoder")}
    if missing := [file for file in files.values() if not file.is_file()]:
        raise FileNotFoundError(f"{path} is one half of a tiny autoencoder; {missing[0]} is missing")
    return {f"{name}.{key}": tensor
            for name, file in files.items() for key, tensor in read_checkpoint(file).items()}


def _averaged(path: Path, state: State, unet: State) -> State:
    """The running averages of the U-Net's weights, kept under names without dots."""
    names = {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in unet}
    if missing := [name for name in names.values() if name not in state]:
        raise ValueError(f"ema=True, but {path} lacks {len(missing)} of {len(names)} averaged weights "
                         f"({missing[0]} …). Leave ema out: most files hold only averages, under plain names")
    return {name: state[averaged] for name, averaged in names.items()}


def _config(path: Path, name: str, read: Callable[[State], dict[str, Any]], state: State) -> dict[str, Any]:
    try:
        return read(state)
    except KeyError as error:
        raise ValueError(f"The {name} in {path} lacks {error}: the file is not complete, or of an "
                         "architecture that is not implemented") from error


def _only_for_folders(path: Path, **arguments: str | None) -> None:
    for key, value in arguments.items():
        if value is not None:
            raise ValueError(f"{key}={value!r} is for folders and repositories; {path} is a single file")
