"""CLIP's tokenizer from the package's own copy of its vocabulary, for checkpoint files, which hold none.

All Stable Diffusion up to XL shares one vocabulary (Radford et al. 2021): 256 bytes, the same at the end of a
word (`</w>`), one token for each of 48,894 merges, and the two special tokens 49406 and 49407.
"""
import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .load import load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES     = Path(__file__).parent.parent / "assets" / "clip" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad: str) -> "CLIPTokenizer":
    """The tokenizer of CLIP and OpenCLIP, 77 tokens long.

    pad: the token that fills prompts up: "<|endoftext|>" for OpenAI's encoders, "!" (token 0) for OpenCLIP's.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8")
        (folder / "merges.txt").write_text(merges, encoding="utf-8", newline="\n")
        (folder / "vocab.json").write_text(json.dumps(_vocabulary(merges)), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
             "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}), encoding="utf-8")
        return load_tokenizer(folder)


def _vocabulary(merges: str) -> dict[str, int]:
    """Token → id, from the text of merges.txt."""
    # A byte is the character of its number where that can be seen, else one from 256 on, in order.
    seen   = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    bytes_ = [chr(number) for number in (*seen, *range(256, 512 - len(seen)))]
    joined = [line.replace(" ", "") for line in merges.splitlines()[1:]]        # the first line is a version
    tokens = [*bytes_, *(byte + "</w>" for byte in bytes_), *joined, START, END]
    return {token: i for i, token in enumerate(tokens)}
