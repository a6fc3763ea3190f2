"""What the U-Net reads besides noise: captions and prompts, encoded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from library.data.dataset import Batch
from library.models.options import PromptOptions
from library.models.prompts import CaptionTokenizer, TokenizedCaption, encode_preview_prompts, encode_tokens
from library.models.stable_diffusion import StableDiffusion


class TextConditioning(Protocol):
    """How text becomes what the U-Net reads; methods that teach the text encoder new words have their own.

    Attributes:
        tokenize: Turns a caption into tokens; loader workers hold it, so it can be pickled.
    """

    @property
    def tokenize(self) -> Callable[[str], TokenizedCaption]: ...  # noqa: D102

    def encode(self, batch: Batch) -> Tensor:
        """The captions of ``batch``: (B, 75 * chunks + 2, text width)."""

    def encode_prompts(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """A preview's prompt and negative prompt: (1, 77 * chunks, text width) each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConditioning:
    """Text through the model's own text encoder.

    Attributes:
        tokenizer: The model's tokenizer.
        text_encoder: The model's text encoder.
        tokenize: As :class:`TextConditioning`.
        clip_skip: Layer of the text encoder to take, from the end; None is its output.
    """

    tokenizer: Any
    text_encoder: Any
    tokenize: Callable[[str], TokenizedCaption]
    clip_skip: int | None

    @classmethod
    def of(cls, model: StableDiffusion, options: PromptOptions) -> "ClipConditioning":
        """The conditioning of ``model`` that ``options`` ask for."""
        return cls(
            tokenizer=model.tokenizer,
            text_encoder=model.text_encoder,
            tokenize=CaptionTokenizer(
                model.tokenizer, max_token_length=options.max_token_length, weighted=options.weighted_captions
            ),
            clip_skip=options.clip_skip,
        )

    def encode(self, batch: Batch) -> Tensor:
        """The captions of ``batch``: (B, 75 * chunks + 2, text width)."""
        return encode_tokens(
            self.text_encoder, batch.input_ids, clip_skip=self.clip_skip, token_weights=batch.token_weights
        )

    def encode_prompts(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """A preview's prompt and negative prompt: (1, 77 * chunks, text width) each."""
        return encode_preview_prompts(self.tokenizer, self.text_encoder, prompt, negative, clip_skip=self.clip_skip)
