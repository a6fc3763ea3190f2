"""Strengths by block of the U-Net, as ``--lbws`` gives them: a number for the text encoder, then one for each block."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Final

from library.errors import Problem, UserError
from networks.block_weights import BLOCK_COUNT, MID_BLOCK, block_index

_WITH_ATTENTION: Final = (1, 2, 4, 5, 7, 8, MID_BLOCK, *range(16, BLOCK_COUNT))
"""The blocks that 17 weights name; in the others a plain LoRA has no modules."""
_FOR_SDXL: Final = (12, 20)


def parse_block_weights(text: str) -> tuple[float, ...]:
    """The weights of one file, that of the text encoder first, from a JSON list.

    Raises:
        ValueError: It is none, or has a number of weights that means nothing here.
    """
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        raise ValueError(f"expects a list of numbers such as [1,0.5,...], not {text!r}")
    if len(values) in _FOR_SDXL:
        raise ValueError(f"has {len(values)} weights, which are those of SDXL; give 17 or 26")
    if len(values) not in (len(_WITH_ATTENTION) + 1, BLOCK_COUNT + 1):
        raise ValueError(f"has {len(values)} weights; give 17 (blocks with attention) or 26 (all blocks)")
    return tuple(float(value) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def block_weight_problems(texts: Sequence[str] | None, files: int) -> list[Problem]:
    """What is wrong with ``--lbws`` for so many files."""
    found = []
    for text in texts or ():
        try:
            parse_block_weights(text)
        except ValueError as error:
            found.append(Problem(f"--lbws {error}", "--lbws", "Write one JSON list for each file, in quotes."))
    if texts is not None and len(texts) != files:
        what = f"--lbws has {len(texts)} lists, and --models {files}"
        found.append(Problem(what, "--lbws", "Give one list for each file, in the same order."))
    return found


def weight_of(name: str, weights: Sequence[float]) -> float:
    """The strength of a module; 0 in a block that the weights do not name."""
    place = _place(name, weights)
    return 0.0 if place is None else weights[place]


def left_out(names: Iterable[str], weights: Sequence[float]) -> list[str]:
    """The modules in blocks that the weights do not name."""
    return sorted(name for name in names if _place(name, weights) is None)


def _place(name: str, weights: Sequence[float]) -> int | None:
    if not name.startswith("lora_unet_"):
        return 0
    try:
        block = block_index(name)
    except UserError as error:
        remedy = "Leave out --lbws for networks of such models."
        raise UserError(error.problems[0].what, where="--lbws", remedy=remedy) from error
    if len(weights) == BLOCK_COUNT + 1:
        return 1 + block
    return 1 + _WITH_ATTENTION.index(block) if block in _WITH_ATTENTION else None
