"""Captions that are the same at every use, so that they can be encoded before training."""

from dataclasses import replace
from typing import TYPE_CHECKING

from library.data.captions import caption_for
from library.data.spec import CaptionRules, DataSpec
from library.errors import Problem
from library.randomness import python_random

if TYPE_CHECKING:
    from library.data.setup import TrainingData

_CHANGING = ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate", "token_warmup_step")


def changing_captions(spec: DataSpec) -> list[Problem]:
    """One problem for each subset whose captions differ from use to use."""
    subsets = [subset for dataset in spec.datasets for subset in dataset.subsets]
    return [
        Problem(
            f"the captions of {subset.name} change from use to use ({', '.join(rules)}) and cannot be encoded once",
            subset.where,
            "Leave --cache_text_encoder_outputs out, or switch these off.",
        )
        for subset in subsets
        if (rules := [name for name in _CHANGING if getattr(subset.captions, name)])
    ]


def fixed_captions(data: "TrainingData") -> tuple[str, ...]:
    """Every caption that training uses, sorted; empty text is among them where captions are dropped.

    Args:
        data: A training set whose captions do not change, see :func:`changing_captions`.
    """
    found: set[str] = set()
    for record in data.records:
        rules = data.rules_of(record).captions
        found.add(_undropped(record.caption, rules))
        if rules.caption_dropout_rate > 0 or rules.caption_dropout_every_n_epochs > 0:
            found.add("")
    return tuple(sorted(found))


def _undropped(caption: str, rules: CaptionRules) -> str:
    kept = replace(rules, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    return caption_for(caption, kept, python_random("fixed"), epoch=1, step=0, total_steps=1)
