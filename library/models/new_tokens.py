"""New tokens for a text encoder: only their rows of the embedding table are parameters, all others stay as they are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.errors import UserError
from library.randomness import torch_generator


class TokenRows(nn.Module):
    """The rows of the new tokens, (tokens, width) float32: what is trained, and what a state keeps."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows.float().clone())


class ExtendedEmbedding(nn.Module):
    """A frozen table of embeddings, and trained rows for ids from ``first`` on.

    The rows are a parameter of their own, so no optimizer, weight decay or moment reaches the table.
    """

    def __init__(self, table: nn.Embedding, rows: TokenRows, *, first: int) -> None:
        super().__init__()
        self.table = table
        self.rows = rows
        self.first = first

    @property
    def weight(self) -> Tensor:
        """The table that others ask for its dtype and device."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., width) of ``ids`` (...), in the dtype of the table."""
        new = ids - self.first
        known: Tensor = self.table(ids.clamp(max=self.first - 1))
        learnt = functional.embedding(new.clamp(min=0), self.rows.weight.to(known.dtype))
        return torch.where((new >= 0)[..., None], learnt, known)


def token_table(text_encoder: nn.Module) -> nn.Embedding:
    """The embedding table of a CLIP text model."""
    # transformers nests the encoder under `text_model` in some versions and not in others.
    inner: Any = getattr(text_encoder, "text_model", text_encoder)
    table: nn.Embedding = inner.embeddings.token_embedding
    return table


def add_tokens(tokenizer: Any, names: Sequence[str]) -> int:
    """Add ``names`` to ``tokenizer`` as whole words, upper and lower case alike; the id of the first, others follow.

    Raises:
        UserError: The tokenizer has one of them already.
    """
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    taken = [name for name in names if name.lower() in vocabulary or name in vocabulary]
    first = len(tokenizer)
    if not taken:
        # Without single_word the token would be found inside other words, too.
        tokenizer.add_tokens([AddedToken(name, single_word=True) for name in names])
    if taken or len(tokenizer) != first + len(names):
        raise UserError(
            f"the tokenizer of the model knows {', '.join(taken or names)} already",
            where="--token_string",
            remedy="Choose another word.",
        )
    return first


def extend(text_encoder: nn.Module, rows: Tensor, *, first: int) -> TokenRows:
    """Give ``text_encoder`` trained ``rows`` for the ids from ``first`` on; returns them as a module."""
    trained = TokenRows(rows.to(token_table(text_encoder).weight.device))
    inner: Any = getattr(text_encoder, "text_model", text_encoder)
    inner.embeddings.token_embedding = ExtendedEmbedding(token_table(text_encoder), trained, first=first)
    return trained


def rows_of_words(text_encoder: nn.Module, ids: Sequence[int], count: int) -> Tensor:
    """The embeddings of known tokens ``ids``, in turn, ``count`` of them: (count, width) float32."""
    assert ids, "checked with the options"
    table = token_table(text_encoder).weight.detach()
    return table[[ids[number % len(ids)] for number in range(count)]].float()


def random_rows(text_encoder: nn.Module, count: int, *, seed: int) -> Tensor:
    """New embeddings like those of the table: (count, width) float32.

    Each is drawn from a normal distribution with mean and deviation of the table, column by column; keyed by ``seed``.
    """
    table = token_table(text_encoder).weight.detach().float()
    drawn = torch.randn(count, table.shape[1], generator=torch_generator(seed, "init", "token_embedding"))
    return table.mean(0) + drawn.to(table.device) * table.std(0)
