"""Prompts → Conditioning, through the CLIP text encoder of `transformers` (Radford et al. 2021)."""
import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .denoiser import Conditioning

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True)
class ClipText:
    """A CLIP text encoder: call it with N prompts, get a Conditioning of N.

    The context is (N, S, D), with S = 77 tokens:

        Stable Diffusion   encoder            D     which states
        1.x                CLIP ViT-L/14      768   the last, after the final LayerNorm
        2.x                OpenCLIP ViT-H/14  1024  the same, of 23 of the original's 24 layers: folders hold
                                                    no more, and of a file with 24 the last is left out
        XL base            CLIP ViT-L/14      768   the penultimate, without the final LayerNorm
        XL base, refiner   OpenCLIP bigG/14   1280  the same; and the *pooled* text as vector, (N, 1280):
                                                    the last state of the end token, projected

    Every prompt is put between a start and an end token and padded to S tokens; the network sees the padding
    too, as it did in training: CLIP is padded with end tokens, OpenCLIP with "!" (id 0). CLIP's own attention
    is causal, so a word knows only the words before it.

    penultimate: as XL wants it, see the table. "Clip skip", an earlier layer of Stable Diffusion 1.x with the
                 final LayerNorm, is `without_last_layers`.
    """
    tokenizer: "CLIPTokenizer"
    model: "CLIPTextModel | CLIPTextModelWithProjection"
    penultimate: bool = False

    @property
    def max_tokens(self) -> int:
        """S: how many tokens the model takes, the start and the end token included."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Warns once for each prompt that is too long, naming the words that have no effect."""
        for prompt in dict.fromkeys(prompts):
            if left_out := self.left_out(prompt):
                warnings.warn(f"The prompt is longer than {self.max_tokens} tokens; "
                              f"without effect is its end: {left_out!r}.", stacklevel=2)
        return self.encode(prompts)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The same without the warning."""
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=self.max_tokens,
                                truncation=True, return_tensors="pt").input_ids                 # (N, S)
        tokens = tokens.to(self.model.device)
        if not self.penultimate:
            return Conditioning(self.model(tokens).last_hidden_state)                           # (N, S, D)
        output  = self.model(tokens, output_hidden_states=True)
        project = getattr(self.model, "text_projection", None)
        if project is None:
            return Conditioning(output.hidden_states[-2])
        # Not the model's own `text_embeds`: with the `eos_token_id` of 2 that all published configs have, it
        # takes the highest id for the end token, and a token that was added later has a higher one.
        end    = (tokens == self.tokenizer.eos_token_id).int().argmax(dim=1)                   # the first one
        pooled = output.last_hidden_state[torch.arange(len(tokens)), end]
        return Conditioning(output.hidden_states[-2], project(pooled))

    def left_out(self, prompt: str) -> str:
        """The words at the end of a prompt that do not fit; empty when all do."""
        # The tokens without start and end; two less than S of them fit. verbose=False: our warning is better.
        tokens = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return str(self.tokenizer.decode(tokens[self.max_tokens - 2:])).strip()


def without_last_layers(text: "ClipText | JoinedText", count: int) -> ClipText:
    """The encoder without its last `count` layers, its final LayerNorm after those that are left; the weights
    are shared. Some models derived from Stable Diffusion 1.x were trained so and say "clip skip 2", which is
    count=1 here and clip_skip=1 in diffusers.

        pipe = replace(pipe, text=without_last_layers(pipe.text, 1))

    Every prompt goes through it, the negative one too. A pipeline saved with it has a file that many layers
    shorter, as those of Stable Diffusion 2.x are.

    Raises:
        ValueError: no layer would be left, or it is an encoder of XL, which reads the last layer but one by
            itself.
    """
    if isinstance(text, JoinedText) or text.penultimate:
        raise ValueError("XL already reads the last layer but one of its text encoders, as it was trained "
                         "to; only encoders of Stable Diffusion 1.x and 2.x can do without more of them.")
    model = copy.deepcopy(text.model, {id(p): p for p in text.model.parameters()})
    inner: Any = getattr(model, "text_model", model)                            # a level that newer ones lack
    layers = inner.encoder.layers
    if not 0 <= count < len(layers):
        raise ValueError(f"The text encoder has {len(layers)} layers: from 0 to {len(layers) - 1} of them "
                         f"can be left out, not {count}.")
    del layers[len(layers) - count:]
    model.config.num_hidden_layers -= count
    return ClipText(text.tokenizer, model)


@dataclass(frozen=True)
class JoinedText:
    """Two encoders that read the same prompt, for the base of SDXL (Podell et al. 2023, section 2.1).

    Their states are joined along the width, (N, S, 768 + 1280); the vector is the pooled text of the second.
    """
    first: ClipText
    second: ClipText

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        first, second = self.first(prompts), self.second.encode(prompts)          # who would warn once more
        return Conditioning(torch.cat([first.context, second.context], dim=-1), second.vector)
