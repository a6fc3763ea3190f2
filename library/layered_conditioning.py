"""Extended textual inversion (XTI, P+): a new word with embeddings of its own for each layer of the U-Net.

Voynov et al. 2023, "P+: Extended Textual Conditioning in Text-to-Image Generation", arXiv 2303.09522. A caption is
encoded once for each of the 16 blocks with cross-attention, and each block reads its own encoding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.conditioning import ClipConditioning
from library.data.dataset import Batch
from library.errors import UserError
from library.models.embedding_files import LAYERS
from library.models.options import PromptOptions
from library.models.prompts import TokenizedCaption, encode_preview_prompts, encode_tokens
from library.models.stable_diffusion import StableDiffusion
from library.textual_inversion import LearntWord


@dataclass(frozen=True, kw_only=True, slots=True)
class LayeredConditioning:
    """Text for every layer: what differs between layers is the embedding of the new word alone.

    The tokenizer knows the word of the first layer; the ids of the following layers' words come after it, layer by
    layer.

    Attributes:
        clip: The model's own way.
        learnt: The new word.
    """

    clip: ClipConditioning
    learnt: LearntWord

    @classmethod
    def of(cls, model: StableDiffusion, options: PromptOptions, learnt: LearntWord) -> "LayeredConditioning":
        """The conditioning of ``model``, whose text encoder knows the word for all layers."""
        return cls(clip=ClipConditioning.of(model, options), learnt=learnt)

    @property
    def encoder(self) -> nn.Module:
        """The text encoder."""
        encoder: nn.Module = self.clip.encoder
        return encoder

    @property
    def tokenize(self) -> Callable[[str], TokenizedCaption]:
        """Turns a caption, in which the word is written out, into the first layer's tokens."""
        return self.clip.tokenize

    def encode(self, batch: Batch) -> Tensor:
        """The captions of ``batch`` for every layer: (B, 16, 75 * chunks + 2, text width)."""
        assert batch.token_weights is None, "checked with the options"
        layers = torch.arange(len(LAYERS), device=batch.input_ids.device)[:, None, None]
        ids = self._ids_of_layers(batch.input_ids[:, None], layers)
        hidden = encode_tokens(self.encoder, ids.flatten(0, 1), clip_skip=self.clip.clip_skip)
        return hidden.view(len(batch.input_ids), len(LAYERS), *hidden.shape[1:])

    def encode_prompts(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """A preview's prompt and negative prompt for every layer: (1, 16, 77 * chunks, text width) each."""
        written = [self.learnt.word.written_out(text) for text in (prompt, negative)]
        encoded = [
            encode_preview_prompts(
                self.clip.tokenizer,
                _OfLayer(self.encoder, partial(self._ids_of_layers, layer=layer)),
                *written,
                clip_skip=self.clip.clip_skip,
            )
            for layer in range(len(LAYERS))
        ]
        context, uncond = (torch.stack(layers, dim=1) for layers in zip(*encoded, strict=True))
        return context, uncond

    def _ids_of_layers(self, ids: Tensor, layer: Tensor | int) -> Tensor:
        """The first layer's ``ids`` with the word of ``layer`` in place of the first layer's."""
        return torch.where(ids >= self.learnt.first, ids + layer * len(self.learnt.word.names), ids)


class _OfLayer(nn.Module):
    """A text encoder that reads the new word as one layer of the U-Net does."""

    def __init__(self, text_encoder: nn.Module, ids_of_layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.text_model = text_encoder
        self._ids_of_layer = ids_of_layer

    def forward(self, ids: Tensor, **options: Any) -> Any:
        """What the text encoder says to ``ids``."""
        return self.text_model(self._ids_of_layer(ids), **options)


def give_layers_their_text(unet: nn.Module) -> None:
    """Let each block of ``unet`` with cross-attention read its own part of a context (B, 16, L, D).

    Other parts of the U-Net pass the context on as it is, so this works below gradient checkpointing too.

    Raises:
        UserError: The U-Net has another number of such blocks.
    """
    blocks = _cross_attention_blocks(unet)
    if len(blocks) != len(LAYERS):
        raise UserError(
            f"the U-Net has {len(blocks)} blocks with cross-attention, and XTI has vectors for {len(LAYERS)}",
            where="--pretrained_model_name_or_path",
            remedy="Use a model with the blocks of Stable Diffusion 1 or 2, or train_textual_inversion.py.",
        )
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(_select(number), with_kwargs=True)


def _cross_attention_blocks(unet: Any) -> list[nn.Module]:
    """The blocks in the order they compute: down, middle, up."""
    levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [block for level in levels for block in getattr(level, "attentions", ())]


def _select(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], Any]]:
    """A hook that gives a block its layer's text."""

    def select(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return given, {**named, "encoder_hidden_states": named["encoder_hidden_states"][:, number]}

    return select
