"""The command `ldm`: a prompt in, PNG files out, each of which remembers how it was made.

Everything that is not a flag is the prompt, but for a first word that is the name of one of COMMANDS.
"""
import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import ldm
from ldm.printable import printable

# Nothing above loads torch: that happens where a picture is made, so that --help and mistyped flags answer
# at once.

# What a picture remembers: the parameters of ldm.sample and of ldm.load, what the tasks with a picture add to
# them, and whether it is a grid. Of models and of pictures that came in, it is the names.
SAMPLE_PARAMETERS = ("negative_prompt", "scheduler", "spacing", "steps", "guidance_scale", "seed",
                     "num_images", "height", "width")
LOAD_PARAMETERS   = ("variant", "revision", "dtype", "vae", "prediction", "ema")
MASK_PARAMETERS   = ("invert", "padding", "feather", "composite")
OPTIONS           = (*SAMPLE_PARAMETERS, "handover", "strength", *MASK_PARAMETERS)
RECORDED          = ("prompt", "model", "image", "mask", "refiner", *OPTIONS, *LOAD_PARAMETERS, "grid")
NEEDS             = {"handover": "refiner", "strength": "image", "mask": "image",      # flag → another
                     **dict.fromkeys(MASK_PARAMETERS, "mask")}

DTYPES = ("float32", "float16", "bfloat16")
USAGE  = """ldm PROMPT [-o FILE] [options]
       ldm PROMPT --image FILE [--mask FILE] [-o FILE] [options]
       ldm --from FILE [-o FILE] [options]
       ldm inspect FILE
       ldm convert FILE FOLDER [options]"""
EPILOG = """\
Files: -o FILE replaces FILE if it exists. Without -o the pictures are written to ldm-1.png,
ldm-2.png … in the current folder, the first names that are free. With -n and -o out.png they are
out-0.png, out-1.png …, or one sheet in out.png with --grid.

Seeds: picture i of a call has the seed SEED + i, and its file says so: `ldm --from out-2.png`
makes that one again, alone. Device and file name are not taken over from the file; a model's
folder and the pictures of --image and --mask are, by their names as they were written.

Checkpoints: `ldm inspect FILE` tells what is in a file and runs none of it; `ldm convert FILE
FOLDER` makes a folder of it that diffusers reads too. To paint such a word: `ldm -- inspect`.

examples:
  ldm "a red circle on a blue background" -o circle.png
  ldm "a green square" --scheduler heun --steps 10 -n 4 --grid -o squares.png
  ldm --from circle.png --seed 7 -o other.png
  ldm "a green star" --image circle.png --strength 0.6 -o star.png
  ldm "a lighthouse at dawn" --model ./stable-diffusion-v1-5 --variant fp16
"""


def parser() -> argparse.ArgumentParser:
    """The flags. One that is not given does not appear in the result, so that --from can fill it in."""
    p = argparse.ArgumentParser(
        prog="ldm", usage=USAGE, description="Make pictures from a prompt by latent diffusion.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("prompt", nargs="?", help="what to show, in quotes")
    p.add_argument("-o", "--output", metavar="FILE", type=Path, help="the PNG to write (see below)")
    p.add_argument("--from", metavar="FILE", dest="source", type=Path,
                   help="make this picture again: its parameters, where no flag here says otherwise")
    p.add_argument("--list-schedulers", action="store_true", help="print the names for --scheduler and exit")
    p.add_argument("--version", action="version", version=f"ldm {ldm.__version__}")

    what = p.add_argument_group("picture")
    what.add_argument("--negative", metavar="PROMPT", dest="negative_prompt", help="what not to show")
    what.add_argument("--seed", type=int, help="first seed (default 0)")
    what.add_argument("-n", "--num-images", metavar="N", type=int, help="how many pictures (default 1)")
    what.add_argument("--height", metavar="PIXELS", type=int, help="a multiple of 8 (default: the model's)")
    what.add_argument("--width", metavar="PIXELS", type=int, help="a multiple of 8 (default: the model's)")
    what.add_argument("--grid", action=argparse.BooleanOptionalAction,
                      help="write one sheet instead of several files")

    given = p.add_argument_group("picture as input")
    given.add_argument("--image", metavar="FILE", help="start from this picture, and keep its size")
    given.add_argument("--strength", metavar="PART", type=float,
                       help="how much of it is replaced, 0 to 1 (default 0.8; with --mask 1)")
    given.add_argument("--mask", metavar="FILE", help="a picture: only where it is white, paint anew")
    given.add_argument("--invert", action=argparse.BooleanOptionalAction, help="only where the mask is black")
    given.add_argument("--padding", metavar="PIXELS", type=int,
                       help="work only on the part around the mask with so much more on each side, "
                            "scaled to the model's size and back")
    given.add_argument("--feather", metavar="PIXELS", type=int,
                       help="width of a soft edge around the mask (default 0)")
    given.add_argument("--composite", action=argparse.BooleanOptionalAction,
                       help="keep each pixel outside of the mask as it was (default)")

    how = p.add_argument_group("sampling")
    how.add_argument("--scheduler", metavar="NAME", help="see --list-schedulers (default: the model's)")
    how.add_argument("--steps", metavar="N", type=int, help="steps of the scheduler (default: the model's)")
    how.add_argument("--guidance", metavar="SCALE", dest="guidance_scale", type=float,
                     help="scale of classifier-free guidance, 1 for none (default: the model's)")
    how.add_argument("--spacing", metavar="NAME",
                     help="where the steps lie: leading, trailing, linspace, karras …")
    how.add_argument("--refiner", metavar="NAME", help="a second model for the last part of the steps")
    how.add_argument("--handover", metavar="PART", type=float,
                     help="the part before it takes over, 0 to 1 (default 0.8)")

    model = p.add_argument_group("model")
    model.add_argument("--model", metavar="NAME",
                       help="hub id, folder or checkpoint file (default: the small model inside the package)")
    add_loading(model)
    model.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    model.add_argument("--device", metavar="NAME",
                       help="cpu, cuda, cuda:1, mps … (default: the fastest there is)")
    model.add_argument("--dtype", choices=DTYPES, help="default: by device")

    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no file names")
    p.add_argument("--debug", action="store_true", help="show Python's stack trace of an error")
    return p


def inspect_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ldm inspect", argument_default=argparse.SUPPRESS,
        description="Tell what a checkpoint or a model's folder holds: family, prediction, dtypes, and what "
                    "becomes of every tensor. Nothing in it is run.")
    p.add_argument("file", metavar="FILE", help="a checkpoint (.safetensors, .ckpt …) or a folder")
    p.add_argument("--variant", metavar="NAME", help="flavour of a folder's weight files, such as fp16")
    p.add_argument("--debug", action="store_true", help="show Python's stack trace of an error")
    return p


def convert_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ldm convert", argument_default=argparse.SUPPRESS,
        description="Write a model as a folder in Hugging Face layout, which diffusers and ldm load.")
    p.add_argument("model", metavar="FILE", help="a checkpoint file (or a folder, or a hub id)")
    p.add_argument("folder", metavar="FOLDER", type=Path, help="a new one, or an empty one")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are in the file)")
    add_loading(p)
    p.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    p.add_argument("--debug", action="store_true", help="show Python's stack trace of an error")
    return p


def add_loading(p: argparse._ActionsContainer) -> None:
    """The flags for how a model is read that both commands have."""
    p.add_argument("--variant", metavar="NAME", help="flavour of the weight files, such as fp16")
    p.add_argument("--vae", metavar="NAME", help="another autoencoder: hub id, folder or file")
    p.add_argument("--prediction", choices=("epsilon", "v_prediction", "sample"),
                   help="what the U-Net tells, where the files do not say it rightly")
    p.add_argument("--ema", action=argparse.BooleanOptionalAction,
                   help="take the averaged weights of a checkpoint with both")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 after an error, 2 for wrong flags, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        flags, work = COMMANDS[words[0]]
        given = vars(flags().parse_args(words[1:]))
    else:
        given, work = parse(words), make_pictures
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print("ldm: warning:", printable(str(message)),
                                                                   file=sys.stderr)
            work(given)
    except KeyboardInterrupt:
        print("ldm: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if "debug" in given:
            raise
        print(f"ldm: error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The flags for pictures, checked as far as can be before any work. Exits with 2 if they are wrong."""
    flags = parser()
    parsed, rest = flags.parse_known_args(words)
    given = vars(parsed)
    if rest:
        flags.error(f"not understood: {' '.join(rest)} (a prompt of several words is put in quotes)")
    if not given.keys() & {"prompt", "source", "list_schedulers"}:
        flags.error('give a prompt, for example: ldm "a red circle on a blue background" -o circle.png')
    problem = output_problem(given.get("output")) or ("source" not in given and flag_problem(given))
    if problem:
        flags.error(problem)
    return given


def make_pictures(given: dict[str, Any]) -> None:
    """Sample and write, with the parameters `given` on the command line over those of the file of --from."""
    if "list_schedulers" in given:
        return list_schedulers()
    from ldm import images
    quiet = "quiet" in given
    remembered = restore(given["source"]) if "source" in given else {}
    for new, old in (("image", ("height", "width")), ("mask", ("strength",))):
        if new in given and new not in remembered:          # these were the defaults without it
            remembered = {key: value for key, value in remembered.items() if key not in old}
    asked      = remembered | given
    if problem := flag_problem(asked):
        raise ValueError(problem if problem != flag_problem(remembered) else
                         f"{problem} ({given['source']} remembers it so; a flag here goes before that)")
    loading  = {"device": asked.get("device"), **{key: asked[key] for key in LOAD_PARAMETERS if key in asked}}
    pipeline = ldm.load(asked.get("model"), **loading)
    inputs   = [asked[key] for key in ("image", "mask") if key in asked]
    make: Any = (ldm.sample, ldm.img2img, ldm.inpaint)[len(inputs)]
    # The defaults are written out, so that a picture says all that made it; a given picture brings its size.
    defaults = asdict(pipeline.defaults)
    if inputs:
        del defaults["height"], defaults["width"]
        defaults["strength"] = 1.0 if "mask" in asked else 0.8
    wanted   = {"prompt": "", "model": None, "negative_prompt": "", "seed": 0, "num_images": 1, "grid": False,
                **defaults, **asked}
    options  = {key: wanted[key] for key in OPTIONS if key in wanted}
    if "refiner" in wanted:
        shared = {key: value for key, value in loading.items() if key in ("device", "dtype", "variant")}
        options["refiner"] = ldm.load(wanted["refiner"], **shared)
    pictures = make(wanted["prompt"], *inputs, pipeline, progress=False if quiet else None, **options)
    if wanted["grid"]:
        files = [(images.grid(pictures), wanted)]
    else:
        files = [(picture, wanted | {"seed": wanted["seed"] + i, "num_images": 1})
                 for i, picture in enumerate(pictures)]
    for (image, parameters), path in zip(files, output_names(given.get("output"), len(files)), strict=False):
        record = {"ldm": ldm.__version__} | {key: parameters[key] for key in RECORDED if key in parameters}
        images.save_png(image, path, record)
        if not quiet:
            print(path)


def show_report(given: dict[str, Any]) -> None:
    """`ldm inspect FILE`."""
    print(ldm.inspect(given["file"], given.get("variant")))


def convert(given: dict[str, Any]) -> None:
    """`ldm convert FILE FOLDER`. The file's own dtype, if it has but one, is kept: so nothing is lost."""
    name  = given["model"]
    there = ldm.inspect(name, given.get("variant")).dtypes if Path(name).expanduser().exists() else {}
    found = [dtype for dtype in DTYPES if dtype in there]
    exact = found[0] if len(found) == 1 and "vae" not in given else "float32"
    loading = {key: given[key] for key in LOAD_PARAMETERS if key in given and key != "dtype"}
    ldm.load(name, device="cpu", dtype=exact, **loading).save(given["folder"], given.get("dtype", exact))
    if "quiet" not in given:
        print(given["folder"])


# First word → its flags, and what it does with them.
COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[dict[str, Any]], None]]] = {
    "inspect": (inspect_parser, show_report),
    "convert": (convert_parser, convert),
}


def flag_problem(asked: dict[str, Any]) -> str | None:
    """What does not go together, or is not there; said before the work, as in `output_problem`."""
    for flag, needed in NEEDS.items():
        if flag in asked and needed not in asked:
            return f"--{flag} needs --{needed}"
    for flag in ("image", "mask"):
        if flag in asked and not Path(asked[flag]).is_file():
            return f"--{flag} {asked[flag]}: there is no such file"
    return None


def restore(path: Path) -> dict[str, Any]:
    """The parameters of a picture that this command wrote."""
    from ldm.images import read_parameters
    parameters = read_parameters(path)
    version    = parameters.pop("ldm", "an unknown version")
    if unknown := parameters.keys() - set(RECORDED):
        raise ValueError(f"{path} was made by ldm {version} with {', '.join(sorted(unknown))}, which ldm "
                         f"{ldm.__version__} does not know: make it again with that version")
    if version != ldm.__version__:
        warnings.warn(f"{path} was made by ldm {version} and this is {ldm.__version__}: "
                      f"the picture may differ", stacklevel=2)
    return parameters


def output_problem(output: Path | None) -> str | None:
    """What is wrong with the name of -o, said before the work instead of after it."""
    folder = Path() if output is None else output.parent
    if output is not None and output.suffix.lower() != ".png":
        return f"-o {output}: the name must end in .png, the format that keeps the parameters too"
    if not folder.is_dir():
        return f"-o {output}: there is no folder {folder}"
    if output is not None and output.is_dir():
        return f"-o {output}: this is a folder; name a file"
    if not os.access(folder, os.W_OK):
        return f"nothing can be written into the folder {folder.resolve()}: name another one with -o"
    return None


def output_names(output: Path | None, number: int) -> Iterator[Path]:
    """Where the pictures go: the file of -o, numbered where there are several, or the next free names."""
    if output is None:
        yield from (path for i in count(1) if not (path := Path(f"ldm-{i}.png")).exists())
    elif number == 1:
        yield output
    else:
        yield from (output.with_stem(f"{output.stem}-{i}") for i in range(number))


def list_schedulers() -> None:
    """The table of names: what --scheduler takes, the function behind it, and what it is elsewhere."""
    from ldm.schedulers import SCHEDULERS
    print(f"{'name':14}{'in ldm.schedulers':20}same picture as diffusers'")
    for name, row in SCHEDULERS.items():
        print(f"{name:14}{row.function.__name__:20}{row.diffusers}")


def explain(error: Exception) -> str:
    """An error as one line for a person: our own messages as they are, anything unexpected with its type.
    Control characters, which may come from a file, are written out."""
    text = printable(" ".join(str(error).split()))
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in text:
        ours  = text.startswith("Out of memory for")
        asked = text.partition(". What helps:")[0] if ours else "out of memory"
        return (f"{asked}: try fewer or smaller pictures (-n, --height, --width), --dtype float16 or "
                f"--device cpu")
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
