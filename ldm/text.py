"""Prompts → Conditioning, through the CLIP text encoder of `transformers` (Radford et al. 2021)."""
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .denoiser import Conditioning

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True)
class ClipText:
    """The text encoder of Stable Diffusion 1.x and 2.x: call it with N prompts, get a Conditioning of N.

    The context is the last hidden state after the final LayerNorm, (N, S, D): S = 77 tokens, D = 768 (SD 1.x,
    CLIP ViT-L/14) or 1024 (SD 2.x, OpenCLIP ViT-H/14, whose files hold 23 of its 24 layers, so that the last
    one in the file is the penultimate one of the original).

    Every prompt is put between a start and an end token and padded to S tokens; the network sees the padding
    too, as it did in training. CLIP's own attention is causal, so a word knows only the words before it.
    """
    tokenizer: "CLIPTokenizer"
    model: "CLIPTextModel | CLIPTextModelWithProjection"

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
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=self.max_tokens,
                                truncation=True, return_tensors="pt").input_ids                 # (N, S)
        return Conditioning(self.model(tokens.to(self.model.device)).last_hidden_state)         # (N, S, D)

    def left_out(self, prompt: str) -> str:
        """The words at the end of a prompt that do not fit; empty when all do."""
        # The tokens without start and end; two less than S of them fit. verbose=False: our warning is better.
        tokens = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return str(self.tokenizer.decode(tokens[self.max_tokens - 2:])).strip()

