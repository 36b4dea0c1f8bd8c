"""`ldm.inspect`: what a model's files hold, told from names, shapes and a few numbers. It runs nothing."""
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..printable import printable
from . import detect
from .detect import UNKNOWN
from .find import find
from .load import Part, plan, shown, skeleton
from .read import read_checkpoint
from .sources import Folder, open_file, read_part

PARTS_OF = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "AutoencoderTiny": "vae",
            "CLIPTextModel": "text_encoder"}


@dataclass(frozen=True)
class Report:
    """What `ldm.inspect` found; `print` shows it.

    what:       the kind of file or folder, and the family of models.
    prediction: "epsilon", "v_prediction" or "sample"; None where there is no U-Net.
    evidence:   how that is known.
    size:       of the weights, in bytes.
    dtypes:     how many tensors of each.
    ema:        whether there is a second U-Net of running averages (`ldm.load(…, ema=True)`).
    account:    every tensor: its name in the files → "used: unet", "ignored: " and why, or "unknown".
    problems:   what would keep `ldm.load` and `ldm.load_vae` from loading the parts that are there, and
                `ldm.sample` from using them.
    """
    path: Path
    what: str
    prediction: str | None
    evidence: str
    size: int
    dtypes: Mapping[str, int]
    ema: bool
    account: Mapping[str, str] = field(repr=False)
    problems: Sequence[str]

    @property
    def used(self) -> list[str]:
        return [name for name, fate in self.account.items() if fate.startswith("used")]

    @property
    def ignored(self) -> list[str]:
        return [name for name, fate in self.account.items() if fate.startswith("ignored")]

    @property
    def unknown(self) -> list[str]:
        return [name for name, fate in self.account.items() if fate == UNKNOWN]

    def __str__(self) -> str:
        rows = [("file", f"{self.path} ({self.size:,} bytes)"), ("what", self.what)]
        if self.prediction:
            rows += [("prediction", f"{self.prediction}: {self.evidence}"),
                     ("EMA", "yes: ldm.load(…, ema=True) reads it" if self.ema else "no")]
        fates = Counter(self.account[name] for name in (*self.used, *self.ignored, *self.unknown)).items()
        rows += [("dtypes", ", ".join(f"{count:,} {dtype}" for dtype, count in self.dtypes.items())),
                 *(("tensors", f"{count:,} {fate}") for fate, count in fates),
                 *(("unknown", name) for name in self.unknown),
                 *(("problem", text) for text in self.problems)]
        return "\n".join(f"{label:<11}{printable(text)}" for label, text in rows)


def inspect(path: str | Path, variant: str | None = None) -> Report:
    """What a checkpoint file or a folder holds: family, prediction, dtypes, and what becomes of every tensor.

    Reads names and shapes, of the numbers a few hundred at most, and runs nothing that is in the files.

    path: a single file (`.safetensors`, `.ckpt` …) of a whole model, an autoencoder, a LoRA …, or a local
          folder in Hugging Face layout, of a pipeline or of one part.
    variant: flavour of the weight files of a folder, such as "fp16".

    Returns a `Report`; `print` shows it. FileNotFoundError: there is none. ValueError: a damaged file, a
    folder without a U-Net, or a variant of which it has no weights.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path.absolute()} (repositories on the Hub are "
                                "not inspected: download one first)")
    return _folder(path, variant) if path.is_dir() else _file(path)


def _file(path: Path) -> Report:
    try:
        file  = open_file(path)
        parts = {name: file.part(name) for name in file.parts}
    except ValueError as error:
        state = read_checkpoint(path)
        what  = detect.kind(state)
        return Report(path, what, None, "", *_numbers(state), False,
                      dict.fromkeys(state, f"ignored: of {what}"), [str(error)])
    fates, problems = _fates(parts)
    account = {}
    for name in file.state:
        part, rest    = detect.place(name)
        account[name] = fates[part, rest] if part else rest if rest == UNKNOWN else f"ignored: {rest}"
    if file.kind == detect.CHECKPOINT:
        problems += [f"there is no {name}" for name in file.needed if name not in parts]
    what = f"{file.family.name}: {file.kind}" if file.family.name else file.kind
    ema  = any(name.startswith("model_ema.diffusion_model") for name in file.state)
    return Report(path, what, file.prediction, file.evidence, *_numbers(file.state), ema, account, problems)


def _folder(path: Path, variant: str | None) -> Report:
    if (path / "model_index.json").is_file():
        source = Folder(find(path, variant=variant), variant)
        parts  = {name: source.part(name) for name in ("unet", "vae", *source.encoders)}
        stated = source.scheduler.get("prediction_type")
        found  = stated or "epsilon"
        family = detect.find_family(parts["unet"].config, found, path.name)
        report = partial(Report, path, f"{family.name}: a folder in Hugging Face layout", found,
                         f"scheduler_config.json{'' if stated else ' does not say; this is the default'}")
    else:
        part   = read_part(path, variant)
        name   = part.config.get("_class_name", "CLIPTextModel")        # transformers writes "architectures"
        parts  = {PARTS_OF.get(name, name): part}
        report = partial(Report, path, f"a folder of {detect.kind(part.tensors)}", None, "")
    fates, problems = _fates(parts)
    state = {(name, tensor): value for name, part in parts.items() for tensor, value in part.tensors.items()}
    account = {"/".join(key) if len(parts) > 1 else key[1]: fate for key, fate in fates.items()}
    return report(*_numbers(state), False, account, problems)


def _fates(parts: Mapping[str, Part]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """(part, tensor) → "used: " and the part, "ignored: " and why, or "unknown"; and what is wrong."""
    fates: dict[tuple[str, str], str] = {}
    problems = []
    for name, part in parts.items():
        latent = part.config.get("out_channels", 4)
        taken  = part.config.get("in_channels") or latent
        if name == "unet" and taken not in (latent, 2 * latent + 1):
            problems.append(f"unet has {taken} input channels, for a task that ldm does not know")
        try:
            build, rename = plan(name, part)
            _, wanted     = skeleton(build)
        except ValueError as error:
            fates |= dict.fromkeys([(name, old) for old in part.tensors], f"ignored: of a {name}")
            problems.append(str(error))
            continue
        free   = rename({}, wanted).keys()                          # what `rename` makes without any file
        filled = set(free)
        for old, tensor in part.tensors.items():
            new  = {k: t for k, t in rename({old: tensor}, wanted).items() if k not in free}
            fits = all(k in wanted and wanted[k].shape == t.shape
                       and t.is_floating_point() >= wanted[k].is_floating_point() for k, t in new.items())
            fates[name, old] = ("ignored: no picture needs it" if not new else
                                f"used: {name}" if fits else UNKNOWN)
            filled |= new.keys() if fits else set()
        if missing := [k for k in wanted if k not in filled]:
            problems.append(f"{name} lacks {len(missing)} tensors: {shown(missing)}")
        if strange := [old for old in part.tensors if fates[name, old] == UNKNOWN]:
            problems.append(f"{name} has {len(strange)} unknown tensors: {shown(strange)}")
    return fates, problems


def _numbers(state: Mapping[Any, Tensor]) -> tuple[int, dict[str, int]]:
    """Size in bytes, tensors of each dtype."""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    return sum(tensor.nbytes for tensor in state.values()), dict(dtypes.most_common())
