"""The command `ldm`: a prompt in, PNG files out, each of which remembers how it was made.

Everything that is not a flag is the prompt.
"""
import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import ldm

# Nothing above loads torch: that happens where a picture is made, so that --help and mistyped flags answer
# at once.

# What a picture remembers: the parameters of ldm.sample, those of ldm.load, and whether it is a grid.
SAMPLE_PARAMETERS = ("negative_prompt", "scheduler", "spacing", "steps", "guidance_scale", "seed",
                     "num_images", "height", "width")
LOAD_PARAMETERS   = ("variant", "revision", "dtype")
RECORDED          = ("prompt", "model", *SAMPLE_PARAMETERS, *LOAD_PARAMETERS, "grid")

USAGE  = """ldm PROMPT [-o FILE] [options]
       ldm --from FILE [-o FILE] [options]"""
EPILOG = """\
Files: -o FILE replaces FILE if it exists. Without -o the pictures are written to ldm-1.png,
ldm-2.png … in the current folder, the first names that are free. With -n and -o out.png they are
out-0.png, out-1.png …, or one sheet in out.png with --grid.

Seeds: picture i of a call has the seed SEED + i, and its file says so: `ldm --from out-2.png`
makes that one again, alone. Device and file name are not taken over from the file; a model's
folder is, as it was written.

examples:
  ldm "a red circle on a blue background" -o circle.png
  ldm "a green square" --scheduler heun --steps 10 -n 4 --grid -o squares.png
  ldm --from circle.png --seed 7 -o other.png
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

    how = p.add_argument_group("sampling")
    how.add_argument("--scheduler", metavar="NAME", help="see --list-schedulers (default: the model's)")
    how.add_argument("--steps", metavar="N", type=int, help="steps of the scheduler (default: the model's)")
    how.add_argument("--guidance", metavar="SCALE", dest="guidance_scale", type=float,
                     help="scale of classifier-free guidance, 1 for none (default: the model's)")
    how.add_argument("--spacing", metavar="NAME",
                     help="where the steps lie: leading, trailing, linspace, karras …")

    model = p.add_argument_group("model")
    model.add_argument("--model", metavar="NAME",
                       help="hub id or folder (default: the small model inside the package)")
    model.add_argument("--variant", metavar="NAME", help="flavour of the weight files, such as fp16")
    model.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    model.add_argument("--device", metavar="NAME",
                       help="cpu, cuda, cuda:1, mps … (default: the fastest there is)")
    model.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: by device")

    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no file names")
    p.add_argument("--debug", action="store_true", help="show Python's stack trace of an error")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 after an error, 2 for wrong flags, 130 after Ctrl-C."""
    flags = parser()
    parsed, rest = flags.parse_known_args(argv)
    given = vars(parsed)
    if rest:
        flags.error(f"not understood: {' '.join(rest)} (a prompt of several words is put in quotes)")
    if not given.keys() & {"prompt", "source", "list_schedulers"}:
        flags.error('give a prompt, for example: ldm "a red circle on a blue background" -o circle.png')
    if problem := output_problem(given.get("output")):
        flags.error(problem)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print("ldm: warning:", message, file=sys.stderr)
            if "list_schedulers" in given:
                list_schedulers()
            else:
                make_pictures(given)
    except KeyboardInterrupt:
        print("ldm: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if "debug" in given:
            raise
        print(f"ldm: error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def make_pictures(given: dict[str, Any]) -> None:
    """Sample and write, with the parameters `given` on the command line over those of the file of --from."""
    from ldm import images
    quiet    = "quiet" in given
    asked    = (restore(given["source"]) if "source" in given else {}) | given
    pipeline = ldm.load(asked.get("model"), device=asked.get("device"),
                        **{key: asked[key] for key in LOAD_PARAMETERS if key in asked})
    # The model's defaults are written out, so that a picture says all that made it.
    wanted   = {"prompt": "", "model": None, "negative_prompt": "", "seed": 0, "num_images": 1, "grid": False,
                **asdict(pipeline.defaults), **asked}
    pictures = ldm.sample(wanted["prompt"], pipeline, progress=False if quiet else None,
                          **{key: wanted[key] for key in SAMPLE_PARAMETERS if key in wanted})
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
    if output is None:
        return None
    if output.suffix.lower() != ".png":
        return f"-o {output}: the name must end in .png, the format that keeps the parameters too"
    if not output.parent.is_dir():
        return f"-o {output}: there is no folder {output.parent}"
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
    """An error as one line for a person: our own messages as they are, anything unexpected with its type."""
    text = " ".join(str(error).split())
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in text:
        return ("out of memory: try fewer or smaller pictures (-n, --height, --width), --dtype float16 or "
                "--device cpu")
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
