"""The emphasis syntax of prompts: ``(more)``, ``[less]``, ``(this much:1.3)``; a backslash makes a bracket plain.

It is the syntax of the common web interfaces, for preview prompts and for captions trained with weights.
"""

import re

ROUND_BRACKET = 1.1
SQUARE_BRACKET = 1 / 1.1

# An escaped character, a weight that closes a round bracket, a bracket, or plain text.
_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)|(?P<bracket>[()\[\]])|(?P<text>[^\\()\[\]:]+|:)"
)


def parse_prompt_weights(prompt: str) -> list[tuple[str, float]]:
    """Cut ``prompt`` into pieces of text with a weight each.

    A round bracket multiplies the weight by 1.1, a square one divides it by 1.1, ``(text:w)`` multiplies it by w;
    brackets nest. A bracket that is never closed reaches to the end; one that was never opened, and a weight that is
    not a number (``(a:1.2.3)``), are text. A backslash makes the next bracket or backslash plain; before anything else
    it is dropped.

    Returns:
        (text, weight) in the order of the prompt, neighbours of equal weight joined; [("", 1.0)] for an empty prompt.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        start = opened[kind].pop()
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for token in _TOKEN.finditer(prompt):
        bracket, weight = token["bracket"], token["weight"]
        if bracket in opened:
            opened[bracket].append(len(pieces))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif bracket == ")" and opened["("]:
            close("(", ROUND_BRACKET)
        elif bracket == "]" and opened["["]:
            close("[", SQUARE_BRACKET)
        else:
            pieces.append((token[0] if token["escaped"] is None else token["escaped"], 1.0))
    for kind, factor in (("(", ROUND_BRACKET), ("[", SQUARE_BRACKET)):
        while opened[kind]:
            close(kind, factor)
    return _joined(pieces)


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined or [("", 1.0)]
