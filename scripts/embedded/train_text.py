"""Stage 2: tokenizer and text encoder, from captions and the scenes they describe.

The U-Net alone teaches a text encoder little about order: for "above" and "below" the loss hardly differs,
and so do the states. Here the encoder learns what a caption means before any picture is made: a throw-away
decoder reads from its states what stands at each of the nine places and what the background is. Noise on the
states keeps meanings far apart. Afterwards the encoder is frozen.

It must not learn which colours and shapes are never seen together ("pink … so no triangle"), or it will not
say what a caption of a new combination says. Three things keep it from that. The decoder is asked what the
caption says, not what the picture shows: a colour or shape left out has an answer of its own, not the
likeliest one. It looks once and reads with linear maps, so each attribute must lie in a direction of its own.
And the captions speak of more colours and shapes than anybody asks for, so what is missing is rare.
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from common import draw, once, replacing, run
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from world import (
    COLOURS,
    MORE_SHAPES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    caption,
    forget,
    random_scene,
)

WIDTH, LAYERS, HEADS, LENGTH = 128, 3, 4, 40
BATCH = 96
NOISE = .5
MORE_COLOURS = tuple("brown cyan teal lime navy magenta turquoise gold silver beige".split())
# The moon is in captions alone: what a reader of the docs fine-tunes on.
ALL_COLOURS, ALL_SHAPES = (*COLOURS, *MORE_COLOURS), (*SHAPES, *MORE_SHAPES, "moon")
START, END = "<|startoftext|>", "<|endoftext|>"
# Words that no caption has: the encoder should know them as words that say nothing, not as rows of letters.
OTHER_WORDS = """
and or the a an of to in on at is are it that this with for from by as be was not no yes my your our his her
its one two three four five nice pretty lovely cute bright dark light pale deep vivid clean minimal flat
modern abstract geometric colorful colourful style art sketch painting photo photograph logo icon symbol
sign poster card graphic design clipart cartoon vector digital paper canvas scene view wall sky sea table
floor surface space behind before between inside outside around near close far beside along there here
standing floating sitting lying hanging placed shown drawn painted made make create render please very
really quite just only single perfect round sharp smooth soft glossy matte empty full half left right top
bottom upper lower middle center centre corner side edge cat dog bird fish house tree car flower sun moon
ball apple person man woman child face hand eye
""".split()


# -------------------------------------------------------------------------------------------------- tokenizer

def make_tokenizer(folder: Path) -> None:
    """Writes a CLIP tokenizer (byte-level BPE, lower case) whose merges make every word of the captions one
    token."""
    rng = Random(1)
    counts = Counter(OTHER_WORDS * 3)
    for _ in range(20000):
        counts.update(re.findall(r"[a-z]+|[^\sa-z]+", caption(told_scene(rng), rng).lower()))
    merges = learn_merges(counts)
    alphabet = list(_bytes_to_unicode().values())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    numbers = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    with replacing(folder) as building:
        building.mkdir(parents=True)
        (building / "vocab.json").write_text(numbers, encoding="utf-8")
        (building / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (building / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
        (building / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True,
             "add_prefix_space": False, "errors": "replace", **special}, indent=2) + "\n")


def learn_merges(counts: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, Algorithm 1), until every counted word is a single token."""
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts if word.isascii()}
    merges = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i:i + 2] = ["".join(best)]
                i += 1


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest moves
    above 255."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}


# ---------------------------------------------------------------------------------------------------- encoder

def make_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=LENGTH,
        hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def told_scene(rng: Random) -> Scene:
    """What a caption may say: a scene, in more colours and shapes than the pictures have, some left blank."""
    return forget(random_scene(rng, colours=ALL_COLOURS, shapes=ALL_SHAPES), rng)


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, LENGTH) token numbers, padded with the end token as Stable Diffusion 1.x does."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH,
                     return_tensors="pt").input_ids


class SceneReader(nn.Module):
    """The throw-away decoder: ten queries (nine places, the whole) look once at the encoder's states
    (N, S, D), and linear maps read what they saw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries   = nn.Parameter(torch.randn(10, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.heads     = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in CLASSES.items()})

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        x, _ = self.attention(self.queries.expand(len(states), -1, -1), states, states, need_weights=False)
        return {name: head(x[:, 9] if name in WHOLE else x[:, :9]) for name, head in self.heads.items()}


WHOLE = {"background": list(ALL_COLOURS), "backdrop": list(TEXTURES)}
AT_PLACE = {"shape": [*ALL_SHAPES, ""], "colour": [*ALL_COLOURS, ""], "size": list(SIZES),
            "texture": list(TEXTURES)}
CLASSES = {**{name: len(values) for name, values in WHOLE.items()},
           **{name: 1 + len(values) for name, values in AT_PLACE.items()}}


def answers(scenes: list[Scene]) -> dict[str, Tensor]:
    """What the reader should say: class numbers (N, 9) for each place, 0 where nothing stands, and (N,) for
    the whole."""
    result = {name: torch.zeros(len(scenes), 9, dtype=torch.long) for name in AT_PLACE}
    for name, values in WHOLE.items():
        result[name] = torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            for name, values in AT_PLACE.items():
                result[name][i, 3 * thing.place[1] + thing.place[0]] = 1 + values.index(getattr(thing, name))
    return result


def noisy(states: Tensor, noise: Tensor) -> Tensor:
    """The states normalised, so that the encoder cannot drown the noise by growing, plus the noise."""
    return F.layer_norm(states, states.shape[-1:]) + NOISE * noise


def garble(text: str, rng: Random) -> str:
    """Now and then puts a word without meaning into a caption: people write what no grammar says."""
    words = text.split()
    if rng.random() < .15:
        made_up = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
        words.insert(rng.randrange(len(words) + 1), rng.choice((made_up, rng.choice(OTHER_WORDS[60:]))))
    return " ".join(words)


def plain_caption(scene: Scene) -> str:
    """Everything that matters in the plainest words, to measure with."""
    names = [f"a {thing.colour} {thing.shape}" for thing in scene.things]
    if len(names) == 2:
        first, second = scene.things
        step = tuple((p > q) - (p < q) for p, q in zip(first.place, second.place, strict=True))
        relation = RELATIONS[step][0] if step in RELATIONS else "and"
        names = [f"{names[0]} {relation} {names[1]}"]
    return f"{names[0]} on a {scene.background} background"


def plainly(scene: Scene) -> bool:
    """Whether `plain_caption` says where things are: one in the middle, or two that are not diagonal."""
    column, row = scene.things[0].place
    return column == row == 1 or (len(scene.things) == 2 and 1 in (column, row))


def train(out: Path, steps: int, device: str) -> None:
    torch.manual_seed(0)
    folder = out / "tokenizer"
    once(lambda: folder.exists() or make_tokenizer(folder))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    encoder, reader = make_encoder(tokenizer).to(device), SceneReader().to(device)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], lr=1e-3, betas=(.9, .98),
                                  weight_decay=.01)

    def losses(scenes: list[Scene], captions: list[str], noise: Tensor) -> tuple[dict, dict]:
        states = encoder(tokens(tokenizer, captions).to(device)).last_hidden_state
        found, right = reader(noisy(states, noise.to(device))), answers(scenes)
        parts = {name: F.cross_entropy(found[name].flatten(0, -2), right[name].to(device).flatten())
                 for name in CLASSES}
        return parts, found

    def step(i: int) -> dict[str, Tensor]:
        rng = Random(10_000_000 + draw(i))
        scenes = [told_scene(rng) for _ in range(BATCH)]
        captions = [garble(caption(scene, rng), rng) for scene in scenes]
        noise = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(draw(i)))
        parts, _ = losses(scenes, captions, noise)
        return {"loss": sum(parts.values()), **parts}

    rng = Random(999)
    tests = {f"{new}{what}": [random_scene(rng, bool(new), count) for _ in range(200)]
             for count, what in ((1, "things"), (2, "pairs")) for new in ("", "new ")}
    tests = {name: [scene for scene in scenes if plainly(scene)] for name, scenes in tests.items()}

    @torch.no_grad()
    def report(_: int) -> str:
        text = []
        for name, scenes in tests.items():
            _, found = losses(scenes, list(map(plain_caption, scenes)), torch.zeros(1, LENGTH, WIDTH))
            right = answers(scenes)
            both = torch.ones(len(scenes), dtype=torch.bool)
            for what in ("shape", "colour"):
                both &= (found[what].argmax(-1).cpu() == right[what]).all(1)
            text.append(f"{name} {both.float().mean():.1%}")
        return "read " + ", ".join(text)

    state = {"encoder": encoder, "reader": reader, "optimiser": optimiser}
    run(out / "text.pt", state, steps, 1e-3, step, report, every=100)
    once(lambda: encoder.eval().save_pretrained(out / "text_encoder"))
