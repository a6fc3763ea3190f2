"""From the text of a caption to the text that is trained on: wildcards, kept and shuffled tags, warm-up, dropout."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from library.data.spec import CaptionRules

_JOINED: Final = ", "
# Doubled braces mean the brace itself; while choices are made, private characters stand for them.
_BRACES: Final = (("{{", "\ue000", "{"), ("}}", "\ue001", "}"))


@dataclass(frozen=True, slots=True)
class _Tags:
    """A caption's tags: those that keep their place in front and behind, and those between that may move or go."""

    front: list[str]
    flexible: list[str]
    back: list[str]


def caption_for(
    record_caption: str, rules: CaptionRules, rng: Random, *, epoch: int, step: int, total_steps: int
) -> str:
    """The caption of one use of an image; the same ``rng`` state gives the same caption.

    Args:
        record_caption: The caption as read; several lines are alternatives.
        rules: The subset's caption rules.
        rng: Where every random choice comes from, in this order: whole-caption dropout, line, each ``{a|b}`` from left
            to right, shuffle, tag dropout.
        epoch: Epoch, from 1.
        step: Optimizer steps done before this one, for the tag warm-up.
        total_steps: Steps of the run, for a warm-up given as a fraction.
    """
    if _is_dropped(rules, rng, epoch):
        return ""
    lines = record_caption.split("\n")
    caption = rng.choice(lines) if rules.enable_wildcard and len(lines) > 1 else lines[0]
    if rules.caption_prefix:
        caption = f"{rules.caption_prefix} {caption}"
    if rules.caption_suffix:
        caption = f"{caption} {rules.caption_suffix}"
    if rules.enable_wildcard:
        caption = _choose_wildcards(caption, rng)
    if rules.shuffle_caption or rules.token_warmup_step > 0 or rules.caption_tag_dropout_rate > 0:
        caption = _rearranged(caption, rules, rng, step=step, total_steps=total_steps)
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.caption_separator)
    return caption


def _is_dropped(rules: CaptionRules, rng: Random, epoch: int) -> bool:
    if rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate:
        return True
    every = rules.caption_dropout_every_n_epochs
    return every > 0 and epoch % every == 0


def _choose_wildcards(caption: str, rng: Random) -> str:
    """Replace each ``{a|b|c}`` by one of its pieces; not nested."""
    for doubled, stand_in, _ in _BRACES:
        caption = caption.replace(doubled, stand_in)
    caption = "".join(_chosen(caption, rng))
    for _, stand_in, brace in _BRACES:
        caption = caption.replace(stand_in, brace)
    return caption


def _chosen(caption: str, rng: Random) -> Iterator[str]:
    """The pieces of ``caption``, of each choice one; braces around nothing, or without an end, are text."""
    done = start = 0
    # Each search goes on where the last one ended, so the time grows with the length alone.
    while (opened := caption.find("{", start)) >= 0 and (closed := caption.find("}", opened)) >= 0:
        start = opened + 1
        if closed > start:
            yield caption[done:opened]
            yield rng.choice(caption[start:closed].split("|"))
            done = start = closed + 1
    yield caption[done:]


def _rearranged(caption: str, rules: CaptionRules, rng: Random, *, step: int, total_steps: int) -> str:
    tags = _split(caption, rules)
    flexible = tags.flexible[: _warm_count(len(tags.flexible), rules, step=step, total_steps=total_steps)]
    if rules.shuffle_caption:
        rng.shuffle(flexible)
    rate = rules.caption_tag_dropout_rate
    if rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= rate]
    return _JOINED.join([*tags.front, *flexible, *tags.back])


def _split(caption: str, rules: CaptionRules) -> _Tags:
    mark, separator = rules.keep_tokens_separator, rules.caption_separator
    if mark and mark in caption:
        front, _, rest = caption.partition(mark)
        middle, _, back = rest.partition(mark)
        return _Tags(*([tag.strip() for tag in part.split(separator) if tag.strip()] for part in (front, middle, back)))
    tags = [tag.strip() for tag in caption.strip().split(separator)]
    return _Tags(tags[: rules.keep_tokens], tags[rules.keep_tokens :], [])


def _warm_count(count: int, rules: CaptionRules, *, step: int, total_steps: int) -> int:
    """How many of ``count`` flexible tags are used at ``step``: from the minimum at step 0 to all after the warm-up."""
    warmup: float = rules.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * total_steps)
    if step >= warmup:
        return count
    least = rules.token_warmup_min
    return math.floor(step * ((count - least) / warmup)) + least
