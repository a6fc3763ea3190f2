"""What the U-Net reads besides noise: captions and prompts, encoded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from library.data.dataset import Batch
from library.errors import UserError
from library.models.options import PromptOptions
from library.models.prompts import CaptionTokenizer, TokenizedCaption, encode_preview_prompts, encode_tokens
from library.models.stable_diffusion import StableDiffusion


class TextConditioning(Protocol):
    """How text becomes what the U-Net reads; methods that teach the text encoder new words have their own.

    Attributes:
        encoder: What training needs of the text encoder; None where captions are encoded already.
        tokenize: Turns a caption into tokens; loader workers hold it, so it can be pickled.
    """

    @property
    def encoder(self) -> nn.Module | None: ...  # noqa: D102
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
        encoder: The model's text encoder.
        tokenize: As :class:`TextConditioning`.
        clip_skip: Layer of the text encoder to take, from the end; None is its output.
    """

    tokenizer: Any
    encoder: Any
    tokenize: Callable[[str], TokenizedCaption]
    clip_skip: int | None

    @classmethod
    def of(cls, model: StableDiffusion, options: PromptOptions) -> "ClipConditioning":
        """The conditioning of ``model`` that ``options`` ask for."""
        return cls(
            tokenizer=model.tokenizer,
            encoder=model.text_encoder,
            tokenize=CaptionTokenizer(
                model.tokenizer, max_token_length=options.max_token_length, weighted=options.weighted_captions
            ),
            clip_skip=options.clip_skip,
        )

    def encode(self, batch: Batch) -> Tensor:
        """The captions of ``batch``: (B, 75 * chunks + 2, text width)."""
        return encode_tokens(self.encoder, batch.input_ids, clip_skip=self.clip_skip, token_weights=batch.token_weights)

    def encode_prompts(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """A preview's prompt and negative prompt: (1, 77 * chunks, text width) each."""
        return encode_preview_prompts(self.tokenizer, self.encoder, prompt, negative, clip_skip=self.clip_skip)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpaddedConditioning:
    """Captions as long as they are, instead of filled up to 77 tokens; previews are filled up as anywhere else.

    Attributes:
        padded: The conditioning with padding, of one chunk.
        end_token: Id of the token that ends a caption; what follows it is padding.
    """

    padded: ClipConditioning
    end_token: int

    @classmethod
    def of(cls, model: StableDiffusion, options: PromptOptions) -> "UnpaddedConditioning":
        """The conditioning of ``model`` that ``options`` ask for."""
        return cls(padded=ClipConditioning.of(model, options), end_token=model.tokenizer.eos_token_id)

    @property
    def encoder(self) -> nn.Module:
        """As :class:`TextConditioning`."""
        encoder: nn.Module = self.padded.encoder
        return encoder

    @property
    def tokenize(self) -> Callable[[str], TokenizedCaption]:
        """As :class:`TextConditioning`."""
        return self.padded.tokenize

    def encode(self, batch: Batch) -> Tensor:
        """The captions of ``batch``: (B, tokens, text width), begin and end tokens among them.

        Raises:
            UserError: The captions have different lengths.
        """
        # (B, 1, 77): the first end token of each.
        lengths = (batch.input_ids == self.end_token).int().argmax(dim=-1).flatten() + 1
        longest = int(lengths.max())
        if int(lengths.min()) != longest:
            raise UserError(
                f"captions of {int(lengths.min()) - 2} to {longest - 2} tokens are in one batch",
                where="--no_token_padding",
                remedy="Use batches of 1 (--gradient_accumulation_steps adds them up), or leave it out.",
            )
        weights = batch.token_weights
        cut = replace(
            batch,
            input_ids=batch.input_ids[..., :longest],
            token_weights=None if weights is None else weights[..., :longest],
        )
        return self.padded.encode(cut)

    def encode_prompts(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """As :class:`TextConditioning`."""
        return self.padded.encode_prompts(prompt, negative)
