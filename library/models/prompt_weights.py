"""The emphasis syntax of prompts: ``(more)``, ``[less]``, ``(this much:1.3)``; a backslash makes a bracket plain.

It is the syntax of the common web interfaces, for preview prompts and for captions trained with weights.
"""

import re
from itertools import groupby
from typing import Final

ROUND_BRACKET = 1.1
SQUARE_BRACKET = 1 / 1.1
LARGEST_WEIGHT: Final = 1000.0
"""Weights beyond it, up or down, are held there: no model makes sense of them, and brackets can nest without end."""

# An escaped character, a weight that closes a round bracket, a bracket, or plain text.
_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)|(?P<bracket>[()\[\]])|(?P<text>[^\\()\[\]:]+|:)"
)
_OPENED_BY: Final = {")": "(", "]": "["}
_FACTORS: Final = {"(": ROUND_BRACKET, "[": SQUARE_BRACKET}


def parse_prompt_weights(prompt: str) -> list[tuple[str, float]]:
    """Cut ``prompt`` into pieces of text with a weight each.

    A round bracket multiplies the weight by 1.1, a square one divides it by 1.1, ``(text:w)`` multiplies it by w;
    brackets nest. A bracket that is never closed reaches to the end; one that was never opened, and a weight that is
    not a number (``(a:1.2.3)``), are text. A backslash makes the next bracket or backslash plain; before anything else
    it is dropped.

    Returns:
        (text, weight) in the order of the prompt, neighbours of equal weight joined; [("", 1.0)] for an empty prompt.
    """
    texts: list[str] = []
    # Where brackets begin and end: the number of texts before, the kind, and the factor; None ends the latest.
    turns: list[tuple[int, str, float | None]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def settle(kind: str, factor: float) -> None:
        turn = opened[kind].pop()
        turns[turn] = (turns[turn][0], kind, factor)

    for token in _TOKEN.finditer(prompt):
        bracket, weight = token["bracket"], token["weight"]
        kind = "(" if weight is not None else _OPENED_BY.get(bracket or "")
        if bracket in opened:
            opened[bracket].append(len(turns))
            turns.append((len(texts), bracket, 1.0))
        elif kind is not None and opened[kind]:
            settle(kind, _FACTORS[kind] if weight is None else float(weight))
            turns.append((len(texts), kind, None))
        else:
            texts.append(token[0] if token["escaped"] is None else token["escaped"])
    for kind, factor in _FACTORS.items():
        while opened[kind]:
            settle(kind, factor)
    return _joined(texts, _weights(turns, len(texts)))


def _weights(turns: list[tuple[int, str, float | None]], count: int) -> list[float]:
    """The weight of each of ``count`` texts, in a time that does not depend on how brackets nest."""
    products: dict[str, list[float]] = {kind: [1.0] for kind in _FACTORS}
    weights: list[float] = []
    for position, kind, factor in (*turns, (count, "(", None)):
        weight = _held(products["("][-1] * products["["][-1])
        weights.extend([weight] * (position - len(weights)))
        if factor is None:
            products[kind].pop()
        else:
            products[kind].append(_held(products[kind][-1] * factor))
    return weights


def _held(weight: float) -> float:
    return min(max(weight, -LARGEST_WEIGHT), LARGEST_WEIGHT)


def _joined(texts: list[str], weights: list[float]) -> list[tuple[str, float]]:
    filled = ((text, weight) for text, weight in zip(texts, weights, strict=True) if text)
    pieces = groupby(filled, key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), weight) for weight, group in pieces] or [("", 1.0)]
