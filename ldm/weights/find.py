"""From a model's name to the folder with its files: a local folder, or a repository in the Hub's cache.

The cache comes first: a snapshot with all we need is used without asking the Hub. So loading is immediate and
works offline, a model whose repository was deleted goes on working, and files do not change under a seed. A
newer version comes with `hf download NAME`, or with `revision=`. One exception: if some components in the
cache lack the variant that is wanted, the Hub is asked whether it has them by now; a commit as `revision=`
keeps the files as they are.
"""
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from .read import choose, file_names, of_variants, read_json, shards, variants

# What we read of a pipeline; a repository has more (safety checker, Flax, ONNX, single-file checkpoints).
WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SMALL_FILES  = ["model_index.json", *(f"{part}/config.json" for part in WITH_WEIGHTS), "scheduler/*.json",
                "tokenizer/*.json", "tokenizer/*.txt", "tokenizer_2/*.json", "tokenizer_2/*.txt"]
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")    # such names are not sought on the Hub
TIMEOUT = 10    # seconds until the Hub counts as out of reach


def find(name: str | Path, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a pipeline in Hugging Face layout (`model_index.json`, `unet/`, `vae/` …).

    name:     a folder, which is returned as it is, without any use of the network; or the id of a repository
              on the Hub ("organisation/model"), whose files are downloaded as far as the cache lacks them.
    revision: branch, tag or commit of a repository.
    variant:  the set of weights that is wanted, "fp16" say. A component without it gives its plain weights.

    FileNotFoundError: no such folder, repository or revision, or not a pipeline.
    ValueError: a folder without a U-Net; no component has the variant; or a revision is given for a folder.
    PermissionError: a gated repository. ConnectionError: the download failed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for repositories on the Hub; {folder} is a folder")
        if not (folder / "model_index.json").exists() and not (folder / "config.json").exists():
            for name in sorted(file_names(folder)):
                if name.endswith(FILE_SUFFIXES):
                    raise FileNotFoundError(f"{folder} has no model_index.json, so it is no pipeline in "
                                            f"Hugging Face layout; to load a single file, give its path, "
                                            f"such as {folder / name}")
        index = read_json(folder / "model_index.json")
        if "unet" not in index:
            raise ValueError(f"{folder} is a {index.get('_class_name', 'pipeline')} without a U-Net; ldm "
                             "reads Stable Diffusion 1.x, 2.x and XL")
        files = [f"{part}/{file}" for part in WITH_WEIGHTS for file in file_names(folder / part)]
        _require_variant(folder, files, variant)
        return folder
    name   = _hub_id(name)
    cached = _in_cache(name, revision, SMALL_FILES)
    have   = _complete(cached, variant) if cached else None
    if cached and have is not None and have <= {variant}:
        return cached
    try:
        return _download(name, revision, lambda listing: wanted(name, listing, variant))
    except OSError:
        if cached and have is not None and variant in have:     # complete, if not all of it in the variant
            return cached
        raise


def find_vae(name: str | Path, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of an autoencoder (`config.json` and weights): in `name` itself, or in its `vae/`.

    Arguments and errors are those of `find`; a folder is only looked into when it is read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for repositories on the Hub; {folder} is a folder")
        return _with_config(folder)
    name   = _hub_id(name)
    cached = _in_cache(name, revision, ["vae/config.json", "config.json"])
    have   = choose(file_names(_with_config(cached)), variant) if cached else None
    if cached and have and have.variant == variant:
        return _with_config(cached)

    def files(listing: Collection[str]) -> list[str]:
        part    = "vae/" if "vae/config.json" in listing else ""
        names   = [path.removeprefix(part) for path in listing if path.startswith(part)]
        weights = choose(names, variant)
        if weights is None or "config.json" not in names:
            others = of_variants(names) if "config.json" in names else ""
            raise FileNotFoundError(f"{name} has no autoencoder in Hugging Face layout (config.json and "
                                    f"weights, at the top or in vae/).{others} There: "
                                    f"{', '.join(sorted(listing)[:12]) or 'nothing'}")
        return [part + file for file in ("config.json", weights.main, *weights.shards)]

    try:
        return _with_config(_download(name, revision, files))
    except OSError:
        if cached and have:                                     # complete, if not in the variant
            return _with_config(cached)
        raise


def wanted(name: str, listing: Collection[str], variant: str | None) -> list[str]:
    """What to download, from the listing of a repository: the small files, one set of weights per component.

    FileNotFoundError: not a pipeline, or a component without weights for us. ValueError: no such variant.
    """
    for needed in ("model_index.json", "unet/config.json", "vae/config.json"):
        if needed not in listing:
            raise FileNotFoundError(f"{name} is not a pipeline of U-Net and autoencoder in Hugging Face "
                                    f"layout: no {needed}, but "
                                    f"{', '.join(sorted(listing)[:12]) or 'nothing'}. (A single file has to "
                                    f"be downloaded; then give its path)")
    _require_variant(name, listing, variant)
    files = [path for path in listing if any(fnmatchcase(path, pattern) for pattern in SMALL_FILES)]
    for part in WITH_WEIGHTS:
        if names := _inside(listing, part):
            weights = choose(names, variant)
            if weights is None:
                raise FileNotFoundError(f"{name} has no plain safetensors or .bin weights in {part}/."
                                        f"{of_variants(names)} There: {', '.join(sorted(names)[:12])}")
            files += [f"{part}/{file}" for file in (weights.main, *weights.shards)]
    return files


def _download(name: str, revision: str | None, choice: Callable[[Collection[str]], list[str]]) -> Path:
    """Downloads the files that `choice` names, of all that are listed. Returns the snapshot's folder."""
    from huggingface_hub import HfApi, snapshot_download

    with _explained(name, revision):
        siblings = HfApi().model_info(name, revision=revision, timeout=TIMEOUT).siblings or []
    files = choice([file.rfilename for file in siblings])
    with _explained(name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    if missing := [file for file in files if not (folder / file).is_file()]:    # the Hub went away meanwhile
        raise ConnectionError(f"The download of {name} was cut off: {folder} lacks {missing[0]}. Try again")
    return folder


def _in_cache(name: str, revision: str | None, files: list[str]) -> Path | None:
    """The cached snapshot of this revision, unless huggingface_hub knows that some of `files` are missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=files))
    except LocalEntryNotFoundError:
        return None


def _with_config(folder: Path) -> Path:
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def _complete(folder: Path, variant: str | None) -> set[str | None] | None:
    """The variants of the weights in a snapshot, where `variant` is preferred; None if some are missing."""
    have = set()
    try:
        for part, kind in read_json(folder / "model_index.json").items():
            names = file_names(folder / part)
            if kind == [None, None]:                                    # a part left out
                continue
            needed = (["config.json"] if part in WITH_WEIGHTS else
                      ["scheduler_config.json"] if part == "scheduler" else
                      ["vocab.json", "merges.txt"] if part.startswith("tokenizer")
                      and "tokenizer.json" not in names else [])
            if not names.issuperset(needed):
                return None
            if part in WITH_WEIGHTS:
                weights = choose(names, variant)
                if weights is None:
                    return None
                if weights.main.endswith(".json"):
                    shards(folder / part / weights.main)
                have.add(weights.variant)
    except FileNotFoundError:
        return None
    return have


def _require_variant(where: str | Path, listing: Collection[str], variant: str | None) -> None:
    found = {part: variants(_inside(listing, part)) for part in WITH_WEIGHTS}
    if variant is not None and not any(variant in names for names in found.values()):
        plain = any(choose(_inside(listing, part), None) for part in WITH_WEIGHTS)
        there = "; ".join(f"{part}: {', '.join(sorted(names))}" for part, names in found.items() if names)
        raise ValueError(f"No component of {where} has weights of variant {variant!r}, only " +
                         (f"{'plain ones and ' if plain else ''}{there}" if there else
                          "plain ones: leave variant out"))


def _inside(listing: Collection[str], folder: str) -> list[str]:
    parts = [path.split("/") for path in listing]
    return [part[1] for part in parts if part[0] == folder and len(part) == 2]


def _hub_id(name: str | Path) -> str:
    """The name, if it can be that of a repository; FileNotFoundError otherwise."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(name).expanduser()
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file, where a folder or the name of a repository is wanted")
    if re.match(r"[a-z]{2,}:/", str(name)):
        raise FileNotFoundError(f"{name} is an address: give the name of the repository, "
                                '"organisation/model", or download the file and give its path')
    try:
        if isinstance(name, str) and path.suffix not in FILE_SUFFIXES:
            validate_repo_id(name)
            return name
    except HFValidationError:
        pass
    raise FileNotFoundError(f"There is no folder or file {path.absolute()} (and {name!r} cannot be on "
                            'the Hub, whose names are strings like "organisation/model")')


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turns the errors of huggingface_hub and of the HTTP library under it into one that says what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    try:
        yield
    except errors.GatedRepoError as error:          # a kind of RepositoryNotFoundError, hence first
        raise PermissionError(f"{name} is gated: accept its terms on {page}, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"There is no repository {page} (it may have been deleted, or be private: "
                                f"`hf auth login`), and no folder {Path(name).absolute()}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{page} has no branch, tag or commit {revision!r}") from error
    except Exception as error:                      # offline, no connection, a proxy, a full disk …
        raise ConnectionError(f"{name} is not complete in the cache {constants.HF_HUB_CACHE} and could not "
                              f"be downloaded ({type(error).__name__}: {error}). Check the connection and "
                              "the space on disk, or give a local folder") from error
