"""From text to the text encoder's hidden states: tokens, long captions in chunks, weights, clip skip.

CLIP reads 77 positions: a begin token, 75 words and an end token. Longer text is cut into chunks of 75, each encoded on
its own.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.prompt_weights import parse_prompt_weights

WORDS_PER_CHUNK = 75
CHUNK_LENGTH = WORDS_PER_CHUNK + 2
PREVIEW_CHUNKS = 3
MEANINGFUL_MEAN = 1e-3
"""Share of the deviation that a mean needs to be more than an accident."""

_log = logging.getLogger(__name__)


class TokenizedCaption(NamedTuple):
    """A caption as the text encoder takes it.

    Attributes:
        ids: Token ids, (chunks, 77) int64.
        weights: One weight a position, (chunks, 77) float32, 1 on begin, end and padding; None for unweighted captions.
    """

    ids: Tensor
    weights: Tensor | None


class CaptionTokenizer:
    """Turns a caption into a fixed number of chunks; can be pickled, so loader workers may hold it."""

    def __init__(self, tokenizer: Any, *, max_token_length: int | None = None, weighted: bool = False) -> None:
        """Choose the length and the syntax.

        Args:
            tokenizer: A CLIP tokenizer; its padding token tells SD1 (the end token) from SD2 ("!", id 0).
            max_token_length: Words a caption may have: a multiple of 75; None is 75. What is longer is cut off.
            weighted: Whether captions use the syntax of :func:`parse_prompt_weights`.
        """
        words = max_token_length or WORDS_PER_CHUNK
        assert words % WORDS_PER_CHUNK == 0, words
        self._tokenizer = tokenizer
        self._chunks = words // WORDS_PER_CHUNK
        self._weighted = weighted

    def __call__(self, caption: str) -> TokenizedCaption:
        """The tokens of ``caption``, and their weights where the syntax has any."""
        if self._weighted:
            ids, weights = _weighted_tokens(self._tokenizer, caption)
            return TokenizedCaption(*_weighted_chunks(self._tokenizer, ids, weights, self._chunks))
        return TokenizedCaption(self._plain_chunks(caption), None)

    def _plain_chunks(self, caption: str) -> Tensor:
        """Tokens and padding of ``caption``, cut into chunks: (chunks, 77).

        An empty chunk is recognised by its padding. With SD2 the padding is the word "!", so "!" at the beginning of a
        chunk of a long caption becomes the end token. Files in use were trained so.
        """
        tokenizer = self._tokenizer
        length = self._chunks * WORDS_PER_CHUNK + 2
        encoded = tokenizer(caption, padding="max_length", truncation=True, max_length=length)
        whole = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        if self._chunks == 1:
            return whole[None]
        begin, words, last = whole[:1], whole[1:-1].view(self._chunks, WORDS_PER_CHUNK), whole[-1:]
        ids = torch.cat([begin.expand(self._chunks, 1), words, last.expand(self._chunks, 1)], dim=1)
        end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        if padding != end:
            ended = (ids[:, -2] == end) | (ids[:, -2] == padding)
            ids[:, -1] = torch.where(ended, ids[:, -1], end)
            ids[:, 1] = torch.where(ids[:, 1] == padding, end, ids[:, 1])
        return ids


def encode_tokens(
    text_encoder: nn.Module, input_ids: Tensor, *, clip_skip: int | None, token_weights: Tensor | None = None
) -> Tensor:
    """Encode captions for training.

    The chunks of a caption are joined without the begin and end tokens between them. Weights multiply the hidden states
    as they are; the mean is not restored afterwards, as it is for previews (:func:`encode_preview_prompts`): that is
    how models with weighted captions are trained today.

    Args:
        text_encoder: A CLIP text model.
        input_ids: (B, chunks, 77).
        clip_skip: Take the n-th hidden state from the end, then the final norm; None is the encoder's output.
        token_weights: (B, chunks, 77), or None.

    Returns:
        (B, 75 * chunks + 2, D).

    Raises:
        UserError: If the text encoder has not that many layers.
    """
    hidden = _encode_chunks(text_encoder, input_ids, clip_skip)
    if token_weights is not None:
        hidden = _times(hidden, token_weights)
    words = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], words, hidden[:, -1, -1:]], dim=1)


def encode_preview_prompts(
    tokenizer: Any,
    text_encoder: nn.Module,
    prompt: str,
    negative: str,
    *,
    clip_skip: int | None,
    max_chunks: int = PREVIEW_CHUNKS,
) -> tuple[Tensor, Tensor]:
    """Encode a prompt and its negative the way the common web interfaces do.

    Weights are taken from :func:`parse_prompt_weights`; after they are applied, each prompt's mean is put back to what
    it was. Both prompts get as many chunks as the longer one needs, and each chunk keeps its begin and end tokens.

    Args:
        tokenizer: A CLIP tokenizer.
        text_encoder: A CLIP text model.
        prompt: What to draw.
        negative: What to avoid; may be empty.
        clip_skip: As for :func:`encode_tokens`.
        max_chunks: The most chunks a prompt may have; what is longer is cut off with a warning.

    Returns:
        Two tensors of (1, 77 * chunks, D), on the text encoder's device: for the prompt and for the negative one.
    """
    tokens = [_weighted_tokens(tokenizer, text) for text in (prompt, negative)]
    longest = max(len(ids) for ids, _ in tokens)
    if longest > max_chunks * WORDS_PER_CHUNK:
        _log.warning("a preview prompt has %d tokens; only the first %d count", longest, max_chunks * WORDS_PER_CHUNK)
    chunks = min(max_chunks, max(1, -(-longest // WORDS_PER_CHUNK)))
    laid = [_weighted_chunks(tokenizer, ids, weights, chunks) for ids, weights in tokens]
    device = next(text_encoder.parameters()).device
    input_ids, token_weights = (torch.stack(parts).to(device) for parts in zip(*laid, strict=True))
    hidden = _encode_chunks(text_encoder, input_ids, clip_skip)
    context = restore_mean(_times(hidden, token_weights), hidden).flatten(1, 2)
    return context[:1], context[1:]


def restore_mean(weighted: Tensor, original: Tensor) -> Tensor:
    """Scale each example of ``weighted`` (B, ...) to the mean that ``original`` has.

    SD1's text encoder has a mean of a tenth of its deviation. Where there is next to none, or it changes its sign, it
    says nothing about size, and the example stays as it is.
    """
    every = tuple(range(1, weighted.ndim))
    before = original.float().mean(every, keepdim=True)
    after = weighted.float().mean(every, keepdim=True)
    least = MEANINGFUL_MEAN * original.float().std(every, keepdim=True)
    usable = (before.abs() > least) & (after.abs() > least) & (before * after > 0)
    return weighted * torch.where(usable, before / after, 1.0).to(weighted.dtype)


def _times(hidden: Tensor, token_weights: Tensor) -> Tensor:
    return hidden * token_weights[..., None].to(hidden.dtype)


def _encode_chunks(text_encoder: nn.Module, input_ids: Tensor, clip_skip: int | None) -> Tensor:
    """Hidden states of every chunk: (B, chunks, 77) -> (B, chunks, 77, D)."""
    batch, chunks, length = input_ids.shape
    flat = input_ids.reshape(batch * chunks, length)
    if clip_skip is None:
        hidden: Tensor = text_encoder(flat).last_hidden_state
    else:
        states = text_encoder(flat, output_hidden_states=True).hidden_states
        if not 1 <= clip_skip < len(states):
            raise UserError(
                f"clip_skip {clip_skip} does not fit: this text encoder has {len(states) - 1} layers",
                where="--clip_skip",
                remedy=f"give a number from 1 to {len(states) - 1}; 1 takes the last layer, 2 the one before it",
            )
        # transformers nests the encoder under `text_model` in some versions and not in others.
        inner: Any = getattr(text_encoder, "text_model", text_encoder)
        hidden = inner.final_layer_norm(states[-clip_skip])
    return hidden.view(batch, chunks, length, -1)


def _weighted_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[float]]:
    """Word ids of ``text`` without begin, end and padding, with a weight each; every piece is tokenized on its own."""
    ids: list[int] = []
    weights: list[float] = []
    for piece, weight in parse_prompt_weights(text):
        found = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        ids += found
        weights += [weight] * len(found)
    return ids, weights


def _weighted_chunks(tokenizer: Any, ids: list[int], weights: list[float], chunks: int) -> tuple[Tensor, Tensor]:
    """Lay words out in chunks: begin, up to 75 words, end, then padding with weight 1; both (chunks, 77)."""
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    laid = torch.full((chunks, CHUNK_LENGTH), padding, dtype=torch.int64)
    laid_weights = torch.ones(chunks, CHUNK_LENGTH)
    laid[:, 0] = begin
    for chunk in range(chunks):
        part = slice(chunk * WORDS_PER_CHUNK, (chunk + 1) * WORDS_PER_CHUNK)
        words = ids[part]
        laid[chunk, 1 : len(words) + 1] = torch.tensor(words, dtype=torch.int64)
        laid[chunk, len(words) + 1] = end
        laid_weights[chunk, 1 : len(words) + 1] = torch.tensor(weights[part])
    return laid, laid_weights
