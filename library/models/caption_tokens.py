"""How a caption falls into tokens, told without a model: for checks and for pictures of the data set.

The CLIP vocabulary that ships with the project is read by the ``tokenizers`` library alone, which takes a tenth of a
second; the training itself uses the model's own tokenizer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from library.models.prompt_weights import parse_prompt_weights

_FILES: Final = Path(__file__).parents[1] / "tokenizer"
_BEGINNING_OF_TEXT: Final = "<|startoftext|>"
_END_OF_TEXT: Final = "<|endoftext|>"
_END_OF_WORD: Final = "</w>"
# What CLIP takes for a word: an English contraction, letters, one digit, or other signs.
_WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_DEFAULT_LENGTH: Final = 75


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a caption.

    Attributes:
        id: Its number in the vocabulary.
        text: The part of the caption it stands for; empty where an earlier token of the same letter shows it.
        starts_word: Whether it stands behind a space, or at the beginning.
        weight: Its weight, where captions are weighted.
    """

    id: int
    text: str
    starts_word: bool
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionTokens:
    """Cuts captions into tokens.

    Attributes:
        limit: Number of tokens of a caption that are used.
        weighted: Whether captions have weights, as ``(red:1.2)``.
        new_words: Words that the model is taught, each a token of its own.
    """

    limit: int
    weighted: bool = False
    new_words: tuple[str, ...] = ()

    @classmethod
    def of(cls, *, max_token_length: int | None, weighted: bool, new_words: tuple[str, ...] = ()) -> "CaptionTokens":
        """As the options say."""
        return cls(limit=max_token_length or _DEFAULT_LENGTH, weighted=weighted, new_words=new_words)

    def __call__(self, caption: str) -> tuple[Token, ...]:
        """All tokens of ``caption``, those behind the limit too; the begin and end tokens are not among them."""
        pieces = parse_prompt_weights(caption) if self.weighted else [(caption, 1.0)]
        return tuple(token for text, weight in pieces for token in self._tokens(text, weight))

    def lost(self, caption: str) -> str:
        """The words of ``caption`` behind the limit, which are never trained on."""
        return joined(self(caption)[self.limit :])

    def _tokens(self, text: str, weight: float) -> list[Token]:
        encoded = _tokenizer(self.new_words).encode(text, add_special_tokens=False)
        tokens: list[Token] = []
        seen = 0
        for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            starts_word = start >= seen and (start == 0 or text[start - 1].isspace())
            tokens.append(Token(number, text[max(start, seen) : end], starts_word, weight))
            seen = max(seen, end)
        return tokens


def joined(tokens: Sequence[Token]) -> str:
    """The text that ``tokens`` stand for."""
    return "".join(f"{' ' if token.starts_word else ''}{token.text}" for token in tokens).strip()


@cache
def vocabulary() -> dict[str, int]:
    """The pieces of words that CLIP knows, with their numbers; ``</w>`` ends a word."""
    pieces: dict[str, int] = json.loads((_FILES / "vocab.json").read_text(encoding="utf-8"))
    return pieces


@cache
def _tokenizer(new_words: tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    # The first line tells the version.
    lines = (_FILES / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines if line)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary(),
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=_END_OF_WORD,
            fuse_unk=False,
            unk_token=_END_OF_TEXT,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([_BEGINNING_OF_TEXT, _END_OF_TEXT])
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in new_words])
    return tokenizer
