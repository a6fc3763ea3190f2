"""A new word in captions and prompts: how it is written out, and what is checked before anything heavy is imported."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from library.data.findings import Finding, error, warning
from library.data.records import ImageRecord
from library.data.spec import DataSpec
from library.data.support import TEXTUAL_INVERSION, DataSupport
from library.data.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from library.errors import Problem
from library.models.caption_tokens import CaptionTokens, vocabulary
from library.models.embedding_files import check_embedding_file
from library.models.embedding_options import EmbeddingOptions

_END_OF_WORD = "</w>"
_UNUSABLE_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWord:
    """A word that stands for one or more new tokens.

    Attributes:
        names: The tokens: the word itself, then the word with 1, 2 ... behind it.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, options: EmbeddingOptions) -> "NewWord":
        """The word that checked ``options`` ask for."""
        word = options.token_string
        assert word, "checked with the options"
        return cls(names=(word, *(f"{word}{number}" for number in range(1, options.num_vectors_per_token))))

    @property
    def token(self) -> str:
        """The word as the user writes it."""
        return self.names[0]

    def is_in(self, text: str) -> bool:
        """Whether ``text`` has the word: as a word of its own, upper and lower case alike."""
        return _as_word(self.token).search(text) is not None

    def written_out(self, text: str) -> str:
        """``text`` with all tokens of the word in its places; where they stand already, nothing changes."""
        if len(self.names) == 1:
            return text
        every = " ".join(self.names)
        there = rf"(?:{re.escape(every)}|{re.escape(self.token)})"
        return re.sub(rf"(?<!\w){there}(?!\w)", lambda _: every, text, flags=re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewording:
    """Puts the tokens of a new word into captions; can be pickled, so loader workers may hold it.

    Attributes:
        word: The word.
        templates: Sentences with ``{}`` that take the place of captions; none keeps the captions.
    """

    word: NewWord
    templates: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: EmbeddingOptions) -> "Rewording":
        """As ``options`` say."""
        templates: tuple[str, ...] = STYLE_TEMPLATES if options.use_style_template else ()
        if options.use_object_template:
            templates = OBJECT_TEMPLATES
        return cls(word=NewWord.of(options), templates=templates)

    def __call__(self, caption: str, record: ImageRecord, rng: Random) -> str:
        """The caption of one use of an image; regularisation images keep theirs, which are not of the new word."""
        if self.templates and not record.is_reg:
            return rng.choice(self.templates).replace("{}", " ".join(self.word.names))
        return self.word.written_out(caption)


def _as_word(text: str) -> re.Pattern[str]:
    """Finds ``text`` where the tokenizer does: not inside other words."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def file_name(word: str) -> str | None:
    """The name of results without ``--output_name``: the word, less the signs that some systems have not in names."""
    return _UNUSABLE_IN_NAMES.sub("", word).strip(". ") or None


def check_word(options: EmbeddingOptions, *, layered: bool) -> list[Problem]:
    """What stands against the new word and its file, as far as the shipped vocabulary and a header tell.

    Args:
        options: The options.
        layered: Whether the word has vectors for every layer.
    """
    known = vocabulary()
    problems = [
        Problem(
            f"'{name}' is a piece of the tokenizer's vocabulary already, so it cannot be a new word",
            "--token_string",
            f"Choose another word, for example {options.token_string}-new.",
        )
        for name in NewWord.of(options).names
        if name.lower() in known
    ]
    if options.init_word is not None and not pieces(options.init_word):
        problems.append(
            Problem(f"--init_word {options.init_word!r} has no known piece", "--init_word", "Give a word of letters.")
        )
    if options.weights is not None:
        problems += check_embedding_file(options.weights, vectors=options.num_vectors_per_token, layered=layered)
    return problems


def pieces(text: str) -> list[str]:
    """The tokens that ``text`` falls into."""
    return [token.text for token in CaptionTokens.of(max_token_length=None, weighted=False)(text)]


def word_notices(options: EmbeddingOptions) -> Iterator[str]:
    """What is worth knowing about the word."""
    known = vocabulary()
    for name in NewWord.of(options).names:
        if f"{name.lower()}{_END_OF_WORD}" in known:
            yield f"the tokenizer knows '{name}' as a word; from now on it stands for what is trained here"
    if options.init_word is None or options.weights is not None:
        return
    found = pieces(options.init_word)
    if len(found) != options.num_vectors_per_token:
        used = ", ".join(repr(piece) for piece in found)
        how = "reused in turn" if len(found) < options.num_vectors_per_token else "the first of them are used"
        yield (
            f"--init_word is {len(found)} token(s) ({used}), the new word has {options.num_vectors_per_token} "
            f"vector(s): {how}"
        )


def word_support(options: EmbeddingOptions) -> DataSupport:
    """What data sets can be used: with templates the captions of their images are not."""
    return replace(TEXTUAL_INVERSION, captions=not (options.use_object_template or options.use_style_template))


def check_captions(rewording: Rewording, spec: DataSpec, records: Sequence[ImageRecord]) -> list[Finding]:
    """Whether captions hold the new word, without which nothing would be trained."""
    if rewording.templates:
        return []
    own = [record for record in records if not record.is_reg]
    without = [record for record in own if not rewording.word.is_in(_possible_text(record, spec))]
    token = rewording.word.token
    remedy = (
        f"Write '{token}' into the captions, set class_tokens or the folder's name to it (10_{token} dog), add "
        f"--caption_prefix='{token}', or use --use_object_template or --use_style_template, which need no captions."
    )
    if own and len(without) == len(own):
        example = f"for example {own[0].path.name}: {own[0].caption!r}"
        return [
            error(
                f"no caption contains the new word '{token}', so it would not be trained",
                f"--token_string, {spec.where}; {example}",
                remedy,
            )
        ]
    if not without:
        return []
    named = ", ".join(record.path.name for record in without[:5]) + (" ..." if len(without) > 5 else "")
    return [
        warning(
            f"{len(without)} of {len(own)} images have captions without '{token}', which teach it nothing: {named}",
            spec.where,
            remedy,
        )
    ]


def _possible_text(record: ImageRecord, spec: DataSpec) -> str:
    """All that the caption of ``record`` may hold."""
    rules = spec.datasets[record.dataset].subsets[record.subset].captions
    caption = record.caption if rules.enable_wildcard else record.caption.split("\n")[0]
    return " ".join(part for part in (rules.caption_prefix, caption, rules.caption_suffix) if part)
