"""Mistakes in captions, and in the rules that are applied to them."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Final, Protocol

from library.data.captions import caption_for
from library.data.findings import Finding, warning
from library.data.records import ImageRecord
from library.data.spec import CaptionRules, SubsetSpec
from library.wording import named

_MOST_NAMED: Final = 5
_ALIKE_AT_LEAST: Final = 5
_ALIKE_SHARE: Final = 0.5
_LENGTHS: Final = (150, 225)
"""Lengths that captions may be given instead of 75 tokens."""

_SIDES: Final = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_MARKUP: Final = re.compile(r"\s*(<[!?a-z].*>|\{\s*\".*\}|\[\s*[{\"].*\])\s*", re.IGNORECASE | re.DOTALL)
_GARBLED: Final = re.compile("\ufffd|Ã[\u0080-\u00bf]|â€")


class Tokens(Protocol):
    """How captions fall into tokens."""

    @property
    def limit(self) -> int:
        """Number of tokens of a caption that are used."""

    def __call__(self, caption: str) -> Sequence[object]:
        """All tokens of a caption."""

    def lost(self, caption: str) -> str:
        """The words of a caption behind the limit."""


def lint_captions(subset: SubsetSpec, records: Sequence[ImageRecord]) -> Iterator[Finding]:
    """What is remarkable about the captions of a subset."""
    written = [record for record in records if record.has_caption_file and record.caption]
    yield from _lint_texts(subset, written)
    yield from _lint_class_tokens(subset, written)
    yield from _lint_marks(subset, records)
    yield from _lint_shuffling(subset, written)
    yield from _lint_shared(subset, records)


def _lint_texts(subset: SubsetSpec, written: Sequence[ImageRecord]) -> Iterator[Finding]:
    texts = Counter(record.caption for record in written)
    commonest, count = texts.most_common(1)[0] if texts else ("", 0)
    if count >= _ALIKE_AT_LEAST and count > texts.total() * _ALIKE_SHARE:
        share = f"all {count}" if len(texts) == 1 else f"{count} of {texts.total()}"
        yield warning(
            f"{share} captions in '{subset.name}' are the same: {_quoted(commonest)}",
            subset.where,
            "Describe in each caption what is in its image, or use class_tokens alone if one text is meant for all.",
        )
    markup = [record for record in written if _MARKUP.fullmatch(record.caption)]
    if markup:
        yield warning(
            f"{len(markup)} captions in '{subset.name}' are markup or JSON instead of a description: {_named(markup)}",
            subset.where,
            "Replace them with plain text: every character of them is trained on.",
        )
    garbled = [record for record in written if not record.caption.isascii() and _GARBLED.search(record.caption)]
    if garbled:
        yield warning(
            f"{len(garbled)} captions in '{subset.name}' have garbled letters, as after a wrong conversion: "
            f"{_named(garbled)}: {_quoted(garbled[0].caption)}",
            subset.where,
            "Write the letters anew and save the files with the encoding UTF-8.",
        )
    sided = [record for record in written if _SIDES.search(record.caption)] if subset.augment.flip_aug else []
    if sided:
        yield warning(
            f"{len(sided)} captions in '{subset.name}' speak of left or right, but flip_aug mirrors half of the "
            f"images: {_named(sided)}",
            subset.where,
            "Set flip_aug = false for these images, or leave the sides out of the captions.",
        )


def _lint_class_tokens(subset: SubsetSpec, written: Sequence[ImageRecord]) -> Iterator[Finding]:
    words = (subset.class_tokens or "").split()
    affixes = f"{subset.captions.caption_prefix} {subset.captions.caption_suffix}".lower()
    if not words or not written or words[0].lower() in affixes:
        return
    if not any(words[0].lower() in record.caption.lower() for record in written):
        yield warning(
            f"'{words[0]}' of the class tokens '{subset.class_tokens}' is in none of the {len(written)} captions in "
            f"'{subset.name}': class tokens are only for images without a caption",
            subset.where,
            f"Write '{words[0]}' into the captions, or give caption_prefix = '{subset.class_tokens},'.",
        )


def _lint_marks(subset: SubsetSpec, records: Sequence[ImageRecord]) -> Iterator[Finding]:
    rules = subset.captions
    choices = [record for record in records if "{" in record.caption and "|" in record.caption]
    if choices and not rules.enable_wildcard:
        yield warning(
            f"captions in '{subset.name}' look like wildcards, which are off: {_quoted(choices[0].caption)}",
            subset.where,
            "Set enable_wildcard = true.",
        )
    mark = rules.keep_tokens_separator
    if not mark:
        return
    marked = any(mark in record.caption for record in records)
    if marked and not _moves(rules):
        yield warning(
            f"the keep_tokens_separator '{mark}' stays in the captions of '{subset.name}': no tag is moved or dropped",
            subset.where,
            "Set shuffle_caption = true, or leave the mark out of the captions.",
        )
    if records and not marked:
        yield warning(
            f"the keep_tokens_separator '{mark}' is in no caption of '{subset.name}'",
            subset.where,
            f"Write '{mark}' behind the tags that keep their place, or leave keep_tokens_separator out.",
        )


def _moves(rules: CaptionRules) -> bool:
    """Whether tags are moved or dropped."""
    return rules.shuffle_caption or rules.caption_tag_dropout_rate > 0 or rules.token_warmup_step > 0


def _lint_shuffling(subset: SubsetSpec, written: Sequence[ImageRecord]) -> Iterator[Finding]:
    rules = subset.captions
    if not written or not _moves(rules) or rules.keep_tokens_separator:
        return
    most = 1 + max(line.count(rules.caption_separator) for record in written for line in record.caption.split("\n"))
    if most == 1:
        yield warning(
            f"no caption in '{subset.name}' has the separator '{rules.caption_separator}', so each is one tag that "
            "cannot be shuffled",
            subset.where,
            "Set caption_separator to what stands between the tags, or leave the shuffling and tag dropout out.",
        )
    elif most <= rules.keep_tokens:
        yield warning(
            f"keep_tokens {rules.keep_tokens} keeps every tag in '{subset.name}' in place: no caption has more than "
            f"{most}",
            subset.where,
            "Lower keep_tokens to the number of tags that are to stay in front.",
        )


def _lint_shared(subset: SubsetSpec, records: Sequence[ImageRecord]) -> Iterator[Finding]:
    if subset.metadata_file is not None:
        return
    own = [record for record in records if record.has_caption_file]
    # All of them lie in one folder.
    stems = [record.name.rpartition(".")[0] for record in own]
    if len(set(stems)) == len(stems):
        return
    sharers: defaultdict[str, list[ImageRecord]] = defaultdict(list)
    for stem, record in zip(stems, own, strict=True):
        sharers[stem].append(record)
    shared = [several for several in sharers.values() if len(several) > 1]
    yield warning(
        f"{len(shared)} caption files in '{subset.name}' are each used for several images: {_named(shared[0])}",
        subset.where,
        "Give the images different names, or remove the copies.",
    )


def lint_rules(subset: SubsetSpec) -> Iterator[Finding]:
    """What is remarkable about the caption rules of a subset, whatever its captions say."""
    rules = subset.captions
    for name, is_everything in (
        ("caption_dropout_rate", rules.caption_dropout_rate >= 1),
        ("caption_dropout_every_n_epochs", rules.caption_dropout_every_n_epochs == 1),
    ):
        if is_everything:
            value = f"{getattr(rules, name):g}"
            yield warning(
                f"{name} {value} leaves out every caption of '{subset.name}'",
                subset.where,
                "Use a small rate, such as caption_dropout_rate = 0.1, or a larger number of epochs.",
            )
    if rules.caption_tag_dropout_rate >= 1:
        yield warning(
            f"caption_tag_dropout_rate {rules.caption_tag_dropout_rate:g} leaves out every tag of '{subset.name}' that "
            "is not kept",
            subset.where,
            "Use a small rate, such as 0.1.",
        )
    if rules.keep_tokens and not _moves(rules):
        yield warning(
            f"keep_tokens {rules.keep_tokens} has no effect in '{subset.name}': no tag is moved or dropped",
            subset.where,
            "Set shuffle_caption = true, or leave keep_tokens out.",
        )
    if rules.token_warmup_min > 1 and not rules.token_warmup_step:
        yield warning(
            f"token_warmup_min {rules.token_warmup_min} has no effect in '{subset.name}' without token_warmup_step",
            subset.where,
            "Give token_warmup_step, for example 0.5 for the first half of the run, or leave both out.",
        )
    for name in ("secondary_separator", "keep_tokens_separator"):
        if getattr(rules, name) == rules.caption_separator:
            yield warning(
                f"{name} and caption_separator are both '{rules.caption_separator}' in '{subset.name}'",
                subset.where,
                f"Choose another {name}, such as ';;;' or '|||', that captions do not use otherwise.",
            )


def lint_lengths(subset: SubsetSpec, records: Sequence[ImageRecord], tokens: Tokens) -> Iterator[Finding]:
    """Captions that are cut at the token limit, with the words that are lost."""
    # What is drawn by chance is left out; so are wildcards, whose pieces differ little in length.
    rules = replace(
        subset.captions,
        shuffle_caption=False,
        enable_wildcard=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
    )
    cut: list[tuple[ImageRecord, str]] = []
    for record in records:
        captions = (
            caption_for(line, rules, Random(0), epoch=1, step=0, total_steps=1) for line in record.caption.split("\n")
        )
        caption = next((caption for caption in captions if tokens.lost(caption)), None)
        if caption is not None:
            cut.append((record, caption))
    shuffled = " (shuffled, other words each time)" if subset.captions.shuffle_caption else ""
    for record, caption in cut[:_MOST_NAMED]:
        yield warning(
            f"the caption is longer than {tokens.limit} tokens, and its end is lost{shuffled}: "
            f"{_quoted(tokens.lost(caption))}",
            str(record.path),
            f"Shorten the caption{_longer_limit(tokens.limit, len(tokens(caption)))}.",
        )
    if len(cut) > _MOST_NAMED:
        longest = max(len(tokens(caption)) for _, caption in cut[_MOST_NAMED:])
        yield warning(
            f"{len(cut) - _MOST_NAMED} more captions in '{subset.name}' are longer than {tokens.limit} tokens: "
            f"{_named([record for record, _ in cut[_MOST_NAMED:]])}",
            subset.where,
            f"Shorten the captions{_longer_limit(tokens.limit, longest)}.",
        )


def _longer_limit(limit: int, needed: int) -> str:
    """The end of a remedy: the option under which ``needed`` tokens fit, or as many of them as can be."""
    longer = [length for length in _LENGTHS if length > limit]
    if not longer:
        return ""
    enough = next((length for length in longer if length >= needed), None)
    if enough is None:
        return f" of {needed} tokens, or give --max_token_length={longer[-1]}, the most there is, and lose fewer"
    return f", or give --max_token_length={enough}"


def lint_orphans(subset: SubsetSpec) -> Iterator[Finding]:
    """Caption files that belong to no image."""
    if subset.metadata_file is not None or not subset.image_dir.is_dir():
        return
    names = os.listdir(subset.image_dir)
    suffix = subset.caption_extension.lower()
    stems = {os.path.splitext(name)[0] for name in names if not name.lower().endswith(suffix)}
    captions = [name for name in names if name.lower().endswith(suffix)]
    # A face crop <name>_<cx>_<cy>_<w>_<h> may use the caption of <name>.
    stems |= {"_".join(stem.split("_")[:-4]) for stem in stems}
    orphans = sorted(name for name in captions if name[: -len(suffix)] not in stems)
    if orphans:
        yield warning(
            f"{len(orphans)} caption files in '{subset.name}' belong to no image: {named(orphans, _MOST_NAMED)}",
            subset.where,
            "Name them as their images, or remove them.",
        )


def _named(records: Sequence[ImageRecord]) -> str:
    return named([record.name for record in records], _MOST_NAMED)


def _quoted(text: str) -> str:
    first = text.split("\n")[0]
    return f"'{first[:80]}…'" if len(first) > 80 else f"'{first}'"
